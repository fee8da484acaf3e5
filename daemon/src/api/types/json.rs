//! Reading request bodies as Go's `encoding/json` does, since clients rely on it.
//!
//! Field names match in any letter case, a `null` is the same as an absent field, a `null` in a list or map
//! is the zero value, and unknown fields are ignored. Everything else is serde's.
//!
//! One thing is stricter than Go: a field that is said twice, in whatever letter case, is refused. Of two readers each
//! could take another one for meant, and one of them may be an authorization plugin.

use serde::{
    de::{self, DeserializeOwned, DeserializeSeed, IntoDeserializer, MapAccess, SeqAccess, Visitor},
    forward_to_deserialize_any,
};
use serde_json::{Error, Map, Value};

/// A `T` from JSON text, by Go's rules.
///
/// # Errors
/// The text is not one JSON value, or does not fit `T`; the message names the field.
pub fn from_slice<T: DeserializeOwned>(text: &[u8]) -> Result<T, Error> {
    let Unambiguous(value) = serde_json::from_slice(text)?;
    from_value(&value)
}

/// A `T` from a JSON value, by Go's rules.
///
/// # Errors
/// The value does not fit `T`; the message names the field.
pub fn from_value<T: DeserializeOwned>(value: &Value) -> Result<T, Error> {
    T::deserialize(Go(value))
}

/// A value none of whose objects says a key twice.
struct Unambiguous(Value);

impl<'de> de::Deserialize<'de> for Unambiguous {
    fn deserialize<D: de::Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        struct Any;
        impl<'de> Visitor<'de> for Any {
            type Value = Value;
            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("a JSON value")
            }
            fn visit_unit<E>(self) -> Result<Value, E> {
                Ok(Value::Null)
            }
            fn visit_bool<E>(self, value: bool) -> Result<Value, E> {
                Ok(value.into())
            }
            fn visit_i64<E>(self, value: i64) -> Result<Value, E> {
                Ok(value.into())
            }
            fn visit_u64<E>(self, value: u64) -> Result<Value, E> {
                Ok(value.into())
            }
            fn visit_f64<E>(self, value: f64) -> Result<Value, E> {
                Ok(value.into())
            }
            fn visit_str<E>(self, value: &str) -> Result<Value, E> {
                Ok(value.into())
            }
            fn visit_string<E>(self, value: String) -> Result<Value, E> {
                Ok(value.into())
            }
            fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Value, A::Error> {
                let mut items = Vec::new();
                while let Some(Unambiguous(item)) = list.next_element()? {
                    items.push(item);
                }
                Ok(items.into())
            }
            fn visit_map<A: MapAccess<'de>>(self, mut entries: A) -> Result<Value, A::Error> {
                let mut map = Map::new();
                while let Some((key, Unambiguous(value))) = entries.next_entry::<String, _>()? {
                    if map.contains_key(&key) {
                        return Err(de::Error::custom(format_args!("{key:?} is there twice")));
                    }
                    map.insert(key, value);
                }
                Ok(map.into())
            }
        }
        from.deserialize_any(Any).map(Self)
    }
}

/// Docker's `strslice`: a list, or one string that stands for a list of one.
pub(super) fn string_or_list<'de, D: de::Deserializer<'de>>(
    from: D,
) -> Result<Option<Vec<String>>, D::Error> {
    struct StringOrList;
    impl<'de> Visitor<'de> for StringOrList {
        type Value = Option<Vec<String>>;
        fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
            f.write_str("a string or a list of strings")
        }
        fn visit_unit<E>(self) -> Result<Self::Value, E> {
            Ok(None)
        }
        fn visit_str<E>(self, text: &str) -> Result<Self::Value, E> {
            Ok(Some(vec![text.to_owned()]))
        }
        fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Self::Value, A::Error> {
            let mut strings = Vec::new();
            while let Some(string) = list.next_element()? {
                strings.push(string);
            }
            Ok(Some(strings))
        }
    }
    from.deserialize_any(StringOrList)
}

#[derive(Clone, Copy)]
struct Go<'de>(&'de Value);

/// A method that takes the zero value for null, else what serde_json does.
macro_rules! null_is_zero {
    ($($method:ident => $visit:ident($zero:expr)),* $(,)?) => {
        $(fn $method<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
            match self.0 {
                Value::Null => visitor.$visit($zero),
                value => value.$method(visitor),
            }
        })*
    };
}

impl<'de> de::Deserializer<'de> for Go<'de> {
    type Error = Error;

    null_is_zero! {
        deserialize_bool => visit_bool(false),
        deserialize_i8 => visit_i8(0),
        deserialize_i16 => visit_i16(0),
        deserialize_i32 => visit_i32(0),
        deserialize_i64 => visit_i64(0),
        deserialize_u8 => visit_u8(0),
        deserialize_u16 => visit_u16(0),
        deserialize_u32 => visit_u32(0),
        deserialize_u64 => visit_u64(0),
        deserialize_f32 => visit_f32(0.0),
        deserialize_f64 => visit_f64(0.0),
        deserialize_str => visit_borrowed_str(""),
        deserialize_string => visit_borrowed_str(""),
    }

    fn deserialize_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        match self.0 {
            Value::Array(items) => visitor.visit_seq(List(items.iter())),
            Value::Object(map) => visitor.visit_map(Object::new(map, None)),
            scalar => scalar.deserialize_any(visitor),
        }
    }

    fn deserialize_option<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        if self.0.is_null() { visitor.visit_none() } else { visitor.visit_some(self) }
    }

    fn deserialize_newtype_struct<V: Visitor<'de>>(
        self,
        _: &'static str,
        visitor: V,
    ) -> Result<V::Value, Error> {
        visitor.visit_newtype_struct(self)
    }

    fn deserialize_seq<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        match self.0 {
            Value::Null => visitor.visit_seq(List([].iter())),
            _ => self.deserialize_any(visitor),
        }
    }

    fn deserialize_tuple<V: Visitor<'de>>(self, _: usize, visitor: V) -> Result<V::Value, Error> {
        self.deserialize_seq(visitor)
    }

    fn deserialize_map<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        match self.0 {
            Value::Null => visitor.visit_map(Object::empty()),
            _ => self.deserialize_any(visitor),
        }
    }

    fn deserialize_struct<V: Visitor<'de>>(
        self,
        _: &'static str,
        fields: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, Error> {
        match self.0 {
            Value::Null => visitor.visit_map(Object::empty()),
            Value::Object(map) => visitor.visit_map(Object::new(map, Some(fields))),
            _ => self.deserialize_any(visitor),
        }
    }

    fn deserialize_enum<V: Visitor<'de>>(
        self,
        name: &'static str,
        variants: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, Error> {
        self.0.deserialize_enum(name, variants, visitor)
    }

    forward_to_deserialize_any! {
        i128 u128 char bytes byte_buf unit unit_struct tuple_struct identifier ignored_any
    }
}

struct List<'de>(std::slice::Iter<'de, Value>);

impl<'de> SeqAccess<'de> for List<'de> {
    type Error = Error;
    fn next_element_seed<S: DeserializeSeed<'de>>(&mut self, seed: S) -> Result<Option<S::Value>, Error> {
        self.0.next().map(|value| seed.deserialize(Go(value))).transpose()
    }
    fn size_hint(&self) -> Option<usize> {
        Some(self.0.len())
    }
}

struct Object<'de> {
    rest: Option<serde_json::map::Iter<'de>>,
    /// Names to match in any case; a map's own keys stay as they are.
    fields: Option<&'static [&'static str]>,
    entry: Option<(&'de str, &'de Value)>,
    seen: Vec<&'static str>,
}

impl<'de> Object<'de> {
    fn new(map: &'de Map<String, Value>, fields: Option<&'static [&'static str]>) -> Self {
        Self { rest: Some(map.iter()), fields, entry: None, seen: Vec::new() }
    }

    fn empty() -> Self {
        Self { rest: None, fields: None, entry: None, seen: Vec::new() }
    }

    /// The next entry whose key means something, by its own name.
    fn advance(&mut self) -> Result<Option<(&'de str, &'de Value)>, Error> {
        loop {
            let Some((key, value)) = self.rest.as_mut().and_then(Iterator::next) else { return Ok(None) };
            let Some(fields) = self.fields else { return Ok(Some((key, value))) };
            let Some(&field) = fields.iter().find(|field| field.eq_ignore_ascii_case(key)) else { continue };
            if self.seen.contains(&field) {
                return Err(de::Error::custom(format_args!("{field:?} is there twice")));
            }
            self.seen.push(field);
            if !value.is_null() {
                return Ok(Some((field, value)));
            }
        }
    }
}

impl<'de> MapAccess<'de> for Object<'de> {
    type Error = Error;

    fn next_key_seed<K: DeserializeSeed<'de>>(&mut self, seed: K) -> Result<Option<K::Value>, Error> {
        self.entry = self.advance()?;
        match self.entry {
            Some((key, _)) => seed.deserialize(key.into_deserializer()).map(Some),
            None => Ok(None),
        }
    }

    fn next_value_seed<S: DeserializeSeed<'de>>(&mut self, seed: S) -> Result<S::Value, Error> {
        let (key, value) = self.entry.take().ok_or_else(|| de::Error::custom("a value without a key"))?;
        seed.deserialize(Go(value)).map_err(|error| de::Error::custom(format_args!("{key}: {error}")))
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use serde::Deserialize;

    use super::*;

    #[derive(Debug, Default, PartialEq, Deserialize)]
    #[serde(default, rename_all = "PascalCase")]
    struct Inner {
        size: i64,
        names: Vec<String>,
    }

    #[derive(Debug, Default, PartialEq, Deserialize)]
    #[serde(default, rename_all = "PascalCase")]
    struct Outer {
        #[serde(rename = "OOMKilled")]
        oom_killed: bool,
        inner: Inner,
        maybe: Option<Inner>,
        labels: BTreeMap<String, String>,
        pair: [u32; 2],
        #[serde(deserialize_with = "string_or_list")]
        cmd: Option<Vec<String>>,
    }

    fn parse(text: &str) -> Result<Outer, String> {
        from_slice(text.as_bytes()).map_err(|error| error.to_string())
    }

    #[test]
    fn names_match_in_any_case_and_map_keys_keep_theirs() {
        let outer =
            parse(r#"{"oomkilled":true,"INNER":{"sIzE":3},"labels":{"KeY":"v"},"Pair":[1,2]}"#).unwrap();
        assert!(outer.oom_killed);
        assert_eq!(outer.inner.size, 3);
        assert_eq!(outer.labels.keys().collect::<Vec<_>>(), ["KeY"]);
        assert_eq!(outer.pair, [1, 2]);
    }

    #[test]
    fn null_is_absent_or_zero_at_every_depth() {
        let outer = parse(
            r#"{"OOMKilled":null,"Inner":{"Size":null,"Names":["a",null]},"Maybe":null,"Labels":{"k":null},"Cmd":null}"#,
        )
        .unwrap();
        assert_eq!(outer.inner.names, ["a", ""]);
        assert_eq!(outer.labels["k"], "");
        assert_eq!(outer.maybe, None);
        assert_eq!(outer.cmd, None);
        assert_eq!(from_slice::<Inner>(b"null").unwrap(), Inner::default());
    }

    #[test]
    fn a_command_may_be_one_string() {
        assert_eq!(parse(r#"{"Cmd":"sh"}"#).unwrap().cmd.unwrap(), ["sh"]);
        assert_eq!(parse(r#"{"Cmd":["sh","-c"]}"#).unwrap().cmd.unwrap(), ["sh", "-c"]);
        assert_eq!(parse(r#"{"Cmd":[]}"#).unwrap().cmd.unwrap(), [""; 0]);
    }

    #[test]
    fn what_does_not_fit_is_refused_by_name() {
        assert!(parse(r#"{"Inner":{"Size":"big"}}"#).unwrap_err().starts_with("Inner: Size: invalid type"));
        assert!(parse(r#"{"Labels":[]}"#).unwrap_err().starts_with("Labels: "));
        assert!(parse(r#"{"Cmd":7}"#).is_err());
        assert!(parse("{").is_err());
        assert!(parse("{} {}").is_err());
    }

    #[test]
    fn what_is_said_twice_is_refused_however_it_is_spelled() {
        for text in [
            r#"{"inner":{"size":1},"INNER":{"size":2}}"#,
            r#"{"Inner":{"Size":1},"inner":null}"#,
            r#"{"Inner":{"Size":1},"Inner":{}}"#,
            r#"{"Inner":{"Size":1,"SIZE":2}}"#,
            r#"{"Labels":{"a":"1","a":"2"}}"#,
            r#"{"Unknown":[{"a":1,"a":2}]}"#,
        ] {
            let error = parse(text).unwrap_err();
            assert!(error.contains("is there twice"), "{text}: {error}");
        }
        // A map's own keys may differ in case alone.
        assert_eq!(parse(r#"{"Labels":{"a":"1","A":"2"}}"#).unwrap().labels.len(), 2);
    }
}
