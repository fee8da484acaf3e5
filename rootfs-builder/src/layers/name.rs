//! What names mean in a layer.

const WHITEOUT: &[u8] = b".wh.";
const WHITEOUT_META: &[u8] = b".wh..wh.";
const WHITEOUT_OPAQUE: &[u8] = b".wh..wh..opq";

/// What a file's name means in a layer (OCI image specification, "Whiteouts").
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Name {
    /// A file of that name.
    Plain(Vec<u8>),
    /// `.wh.<name>`: that name of the layers below is gone.
    Whiteout(Vec<u8>),
    /// `.wh..wh..opq`: nothing of the layers below shows in this directory.
    Opaque,
    /// AUFS's own bookkeeping, which no layer's consumer looks at.
    Ignored,
}

impl Name {
    /// Reads a name.
    ///
    /// # Errors
    /// A whiteout of no possible name, for people.
    pub(super) fn read(name: &[u8]) -> Result<Self, String> {
        if name == WHITEOUT_OPAQUE {
            return Ok(Self::Opaque);
        }
        if name.starts_with(WHITEOUT_META) {
            return Ok(Self::Ignored);
        }
        match name.strip_prefix(WHITEOUT) {
            Some(b"" | b"." | b"..") => Err("it is a whiteout of no file".into()),
            Some(hidden) => Ok(Self::Whiteout(hidden.to_vec())),
            None => Ok(Self::Plain(name.to_vec())),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whiteouts_are_recognised() {
        assert_eq!(Name::read(b".wh.a"), Ok(Name::Whiteout(b"a".to_vec())));
        assert_eq!(Name::read(b".wh..wh..opq"), Ok(Name::Opaque));
        assert_eq!(Name::read(b".wh..wh.plnk"), Ok(Name::Ignored));
        assert_eq!(Name::read(b"wh.a"), Ok(Name::Plain(b"wh.a".to_vec())));
        for none in [&b".wh."[..], b".wh..", b".wh..."] {
            assert!(Name::read(none).is_err());
        }
    }
}
