//! The `filters` query parameter of list, prune and events.

use std::collections::{BTreeMap, BTreeSet};

use serde::Deserialize;

/// Filters: for each key a set of values. Clients write them as `{"key":{"value":true}}` or, before API
/// 1.22 and in many libraries still, as `{"key":["value"]}`.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Filters {
    keys: BTreeMap<String, BTreeSet<String>>,
}

/// Why filters were refused; all are 400.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum FilterError {
    /// Not JSON, or of neither form.
    #[error("invalid filter")]
    Malformed,
    /// A key that the operation does not know.
    #[error("invalid filter '{0}'")]
    UnknownKey(String),
    /// A value that the key does not take.
    #[error("invalid filter '{key}={value}'")]
    InvalidValue {
        /// The key.
        key: String,
        /// The value, or several as a list.
        value: String,
    },
}

impl From<FilterError> for crate::engine::Error {
    fn from(error: FilterError) -> Self {
        Self::invalid(error.to_string())
    }
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Values {
    Set(BTreeMap<String, bool>),
    List(Vec<String>),
}

impl Filters {
    /// From the parameter's text; absent and empty are no filters. Keys outside `accepted` are refused.
    ///
    /// # Errors
    /// [`FilterError::Malformed`] and [`FilterError::UnknownKey`].
    pub fn parse(text: &str, accepted: &[&str]) -> Result<Self, FilterError> {
        if text.is_empty() {
            return Ok(Self::default());
        }
        let parsed: BTreeMap<String, Values> =
            serde_json::from_str(text).map_err(|_| FilterError::Malformed)?;
        let mut keys = BTreeMap::new();
        for (key, values) in parsed {
            if !accepted.contains(&key.as_str()) {
                return Err(FilterError::UnknownKey(key));
            }
            let values = match values {
                Values::Set(set) => set.into_iter().filter_map(|(value, on)| on.then_some(value)).collect(),
                Values::List(list) => list.into_iter().collect(),
            };
            keys.insert(key, values);
        }
        Ok(Self { keys })
    }

    /// Adds a value.
    pub fn insert(&mut self, key: impl Into<String>, value: impl Into<String>) {
        self.keys.entry(key.into()).or_default().insert(value.into());
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.keys.is_empty()
    }

    /// Whether the key is given.
    pub fn contains(&self, key: &str) -> bool {
        self.keys.contains_key(key)
    }

    /// The key's values, sorted.
    pub fn get(&self, key: &str) -> impl Iterator<Item = &str> {
        self.keys.get(key).into_iter().flatten().map(String::as_str)
    }

    fn values(&self, key: &str) -> Option<&BTreeSet<String>> {
        self.keys.get(key).filter(|values| !values.is_empty())
    }

    /// Whether `candidate` passes: the key is not given, or one of its values is exactly `candidate`.
    pub fn exact(&self, key: &str, candidate: &str) -> bool {
        self.values(key).is_none_or(|values| values.contains(candidate))
    }

    /// Whether `candidate` passes: the key is not given, or one of its values is true of it.
    pub fn any(&self, key: &str, mut is_true: impl FnMut(&str) -> bool) -> bool {
        self.values(key).is_none_or(|values| values.iter().any(|value| is_true(value)))
    }

    /// Whether `candidate` passes: the key is not given, or one of its values begins `candidate`.
    pub fn prefix(&self, key: &str, candidate: &str) -> bool {
        self.any(key, |value| candidate.starts_with(value))
    }

    /// Whether labels pass: *every* value (`name` or `name=value`) is among them.
    pub fn labels(&self, key: &str, labels: &BTreeMap<String, String>) -> bool {
        self.values(key).is_none_or(|values| values.iter().all(|value| has_label(labels, value)))
    }

    /// Whether labels pass a negated key (`label!`): *none* of its values is among them.
    pub fn no_labels(&self, key: &str, labels: &BTreeMap<String, String>) -> bool {
        self.values(key).is_none_or(|values| !values.iter().any(|value| has_label(labels, value)))
    }

    /// A key that holds one boolean (`dangling`, `all`), or `default` when it is not given.
    ///
    /// # Errors
    /// [`FilterError::InvalidValue`] when it is neither, or both.
    pub fn boolean(&self, key: &str, default: bool) -> Result<bool, FilterError> {
        let Some(values) = self.keys.get(key) else { return Ok(default) };
        let holds = |texts: [&str; 2]| texts.iter().any(|text| values.contains(*text));
        match (holds(["1", "true"]), holds(["0", "false"])) {
            (true, false) => Ok(true),
            (false, true) => Ok(false),
            _ => Err(FilterError::InvalidValue {
                key: key.to_owned(),
                value: format!("[{}]", values.iter().cloned().collect::<Vec<_>>().join(" ")),
            }),
        }
    }
}

fn has_label(labels: &BTreeMap<String, String>, wanted: &str) -> bool {
    match wanted.split_once('=') {
        Some((name, value)) => labels.get(name).is_some_and(|have| have == value),
        None => labels.contains_key(wanted),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn parse(text: &str) -> Result<Filters, String> {
        Filters::parse(text, &["label", "dangling", "id"]).map_err(|error| error.to_string())
    }

    #[test]
    fn both_forms_mean_the_same() {
        let set = parse(r#"{"label":{"a=b":true,"c":true,"off":false}}"#).unwrap();
        let list = parse(r#"{"label":["c","a=b"]}"#).unwrap();
        assert_eq!(set, list);
        assert_eq!(set.get("label").collect::<Vec<_>>(), ["a=b", "c"]);
    }

    #[test]
    fn refusals_are_worded_as_docker_words_them() {
        for (text, message) in [
            (r#"{"nosuch":["x"]}"#, "invalid filter 'nosuch'"),
            ("{", "invalid filter"),
            (r#"{"label":"x"}"#, "invalid filter"),
            (r#"["label"]"#, "invalid filter"),
        ] {
            assert_eq!(parse(text).unwrap_err(), message, "{text}");
        }
        let both = parse(r#"{"dangling":["true","false"]}"#).unwrap();
        assert_eq!(
            both.boolean("dangling", false).unwrap_err().to_string(),
            "invalid filter 'dangling=[false true]'"
        );
    }

    #[test]
    fn booleans() {
        for (text, expected) in
            [("", true), (r#"{"dangling":["1"]}"#, true), (r#"{"dangling":{"false":true}}"#, false)]
        {
            assert_eq!(parse(text).unwrap().boolean("dangling", true), Ok(expected), "{text}");
        }
        assert!(parse(r#"{"dangling":["maybe"]}"#).unwrap().boolean("dangling", true).is_err());
    }

    #[test]
    fn matching() {
        let labels: BTreeMap<_, _> =
            [("a".to_owned(), "b".to_owned()), ("c".to_owned(), String::new())].into();
        let of = |text| parse(text).unwrap();
        assert!(of("").labels("label", &labels));
        assert!(of(r#"{"label":["a=b","c"]}"#).labels("label", &labels));
        assert!(!of(r#"{"label":["a=x"]}"#).labels("label", &labels));
        assert!(!of(r#"{"label":["a","d"]}"#).labels("label", &labels));
        assert!(!of(r#"{"label":["a","d"]}"#).no_labels("label", &labels));
        assert!(of(r#"{"label":["d"]}"#).no_labels("label", &labels));
        assert!(of(r#"{"id":["ab"]}"#).prefix("id", "abc"));
        assert!(!of(r#"{"id":["ab"]}"#).exact("id", "abc"));
        assert!(of(r#"{"id":[]}"#).exact("id", "abc"));
    }

    proptest! {
        #[test]
        fn what_a_client_writes_is_what_is_read(values in proptest::collection::btree_set(".{0,8}", 1..5)) {
            let list = serde_json::json!({ "label": values }).to_string();
            let set: BTreeMap<_, _> = values.iter().map(|value| (value, true)).collect();
            let set = serde_json::json!({ "label": set }).to_string();
            prop_assert_eq!(parse(&list), parse(&set));
            let filters = parse(&list).unwrap();
            prop_assert!(filters.get("label").eq(values.iter().map(String::as_str)));
        }

        #[test]
        fn no_text_is_a_panic(text in ".{0,64}") {
            let _ = parse(&text);
        }
    }
}
