//! Shell patterns as Go's `path.Match` reads them: `*` and `?` do not cross `/`, `[a-z]` and `[^a-z]` are
//! classes, `\` takes the next character as it is.

/// The pattern is malformed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("syntax error in pattern")]
pub struct PatternError;

/// The longest pattern that is looked at.
const MAX_PATTERN: usize = 4096;

enum Token {
    Star,
    Any,
    Literal(char),
    Class { negated: bool, ranges: Vec<(char, char)> },
}

impl Token {
    fn accepts(&self, c: char) -> bool {
        match self {
            Self::Star | Self::Any => c != '/',
            Self::Literal(literal) => *literal == c,
            Self::Class { negated, ranges } => {
                ranges.iter().any(|(low, high)| (*low..=*high).contains(&c)) != *negated
            }
        }
    }
}

/// Whether `pattern` matches the whole of `text`.
///
/// # Errors
/// [`PatternError`], whether or not the text would have matched up to the fault.
pub(super) fn matches(pattern: &str, text: &str) -> Result<bool, PatternError> {
    let tokens = parse(pattern)?;
    let text: Vec<char> = text.chars().collect();
    // The set of token positions that what was read so far may have come to: time is pattern × text, whatever
    // the stars.
    let mut reached = vec![false; tokens.len() + 1];
    reached[0] = true;
    skip_stars(&tokens, &mut reached);
    for c in text {
        let mut next = vec![false; tokens.len() + 1];
        for (position, token) in tokens.iter().enumerate() {
            if reached[position] && token.accepts(c) {
                next[if matches!(token, Token::Star) { position } else { position + 1 }] = true;
            }
        }
        skip_stars(&tokens, &mut next);
        reached = next;
    }
    Ok(reached[tokens.len()])
}

/// A star may stand for nothing.
fn skip_stars(tokens: &[Token], reached: &mut [bool]) {
    for (position, token) in tokens.iter().enumerate() {
        if reached[position] && matches!(token, Token::Star) {
            reached[position + 1] = true;
        }
    }
}

fn parse(pattern: &str) -> Result<Vec<Token>, PatternError> {
    if pattern.len() > MAX_PATTERN {
        return Err(PatternError);
    }
    let mut tokens = Vec::new();
    let mut rest = pattern.chars().peekable();
    while let Some(c) = rest.next() {
        tokens.push(match c {
            '*' => Token::Star,
            '?' => Token::Any,
            '\\' => Token::Literal(rest.next().ok_or(PatternError)?),
            '[' => {
                let negated = rest.next_if_eq(&'^').is_some();
                let mut ranges = Vec::new();
                while ranges.is_empty() || rest.next_if_eq(&']').is_none() {
                    let low = class_character(&mut rest)?;
                    let high =
                        if rest.next_if_eq(&'-').is_some() { class_character(&mut rest)? } else { low };
                    ranges.push((low, high));
                }
                Token::Class { negated, ranges }
            }
            literal => Token::Literal(literal),
        });
    }
    Ok(tokens)
}

fn class_character(rest: &mut std::iter::Peekable<std::str::Chars<'_>>) -> Result<char, PatternError> {
    match rest.next().ok_or(PatternError)? {
        '-' | ']' => Err(PatternError),
        '\\' => rest.next().ok_or(PatternError),
        c => Ok(c),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patterns_match_as_in_go() {
        for (pattern, text, expected) in [
            ("abc", "abc", Ok(true)),
            ("*", "abc", Ok(true)),
            ("*c", "abc", Ok(true)),
            ("a*", "a", Ok(true)),
            ("a*", "ab/c", Ok(false)),
            ("a*/b", "abc/b", Ok(true)),
            ("a*b*c*d*e*/f", "axbxcxdxe/f", Ok(true)),
            ("a*b?c*x", "abxbbxdbxebxczzy", Ok(false)),
            ("ab[c]", "abc", Ok(true)),
            ("ab[^e-g]", "abc", Ok(true)),
            ("ab[^b-d]", "abc", Ok(false)),
            ("a\\*b", "a*b", Ok(true)),
            ("a?b", "a/b", Ok(false)),
            ("", "", Ok(true)),
            ("", "a", Ok(false)),
            ("[", "a", Err(PatternError)),
            ("[]a]", "]", Err(PatternError)),
            ("[a-]", "a", Err(PatternError)),
            ("[-x]", "x", Err(PatternError)),
            ("a[", "ab", Err(PatternError)),
            ("\\", "a", Err(PatternError)),
        ] {
            assert_eq!(matches(pattern, text), expected, "{pattern} {text}");
        }
    }
}
