//! A Rust file as lines of code and lines of comment. Not a parser: it knows strings, characters, raw strings and
//! comments, which is what it takes not to mistake one for the other.

/// A file, line by line.
pub(super) struct Source {
    pub(super) lines: Vec<Line>,
}

/// One line, its strings emptied.
#[derive(Debug, Default)]
pub(super) struct Line {
    pub(super) number: usize,
    pub(super) code: String,
    pub(super) comment: String,
}

impl Line {
    pub(super) fn has_word(&self, word: &str) -> bool {
        self.code.split(|c: char| !c.is_alphanumeric() && c != '_').any(|part| part == word)
    }
}

/// What the next character belongs to.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Mode {
    Code,
    LineComment,
    /// How deep: Rust's nest.
    BlockComment(usize),
    Text,
    /// Number of `#` that end it.
    RawText(usize),
}

impl Source {
    pub(super) fn parse(text: &str) -> Source {
        let mut lines = Vec::new();
        let mut mode = Mode::Code;
        for (index, line) in text.lines().enumerate() {
            let mut parsed = Line { number: index + 1, ..Line::default() };
            if mode == Mode::LineComment {
                mode = Mode::Code;
            }
            mode = parse_line(line, mode, &mut parsed);
            lines.push(parsed);
        }
        Source { lines }
    }
}

fn parse_line(line: &str, mut mode: Mode, parsed: &mut Line) -> Mode {
    let mut rest = line;
    while let Some(c) = rest.chars().next() {
        let mut length = c.len_utf8();
        match mode {
            Mode::Code => {
                let hashes = raw_string(rest, &parsed.code);
                if rest.starts_with("//") {
                    parsed.comment.push_str(rest);
                    return Mode::LineComment;
                } else if rest.starts_with("/*") {
                    (mode, length) = (Mode::BlockComment(1), 2);
                } else if let Some(hashes) = hashes {
                    (mode, length) = (Mode::RawText(hashes), hashes + 2);
                } else if c == '"' {
                    mode = Mode::Text;
                } else if c == '\'' {
                    length = character(rest).unwrap_or(1);
                } else {
                    parsed.code.push(c);
                }
            }
            Mode::LineComment => parsed.comment.push(c),
            Mode::BlockComment(depth) => {
                if rest.starts_with("*/") {
                    mode = if depth == 1 { Mode::Code } else { Mode::BlockComment(depth - 1) };
                    length = 2;
                } else if rest.starts_with("/*") {
                    (mode, length) = (Mode::BlockComment(depth + 1), 2);
                } else {
                    parsed.comment.push(c);
                }
            }
            Mode::Text => {
                if c == '\\' {
                    length += rest.chars().nth(1).map_or(0, char::len_utf8);
                } else if c == '"' {
                    mode = Mode::Code;
                }
            }
            Mode::RawText(hashes) => {
                let end = rest
                    .strip_prefix('"')
                    .is_some_and(|after| after.bytes().take(hashes).eq((0..hashes).map(|_| b'#')));
                if end {
                    (mode, length) = (Mode::Code, hashes + 1);
                }
            }
        }
        rest = rest.get(length..).unwrap_or_default();
    }
    mode
}

/// The number of `#` if a raw string starts here.
fn raw_string(rest: &str, before: &str) -> Option<usize> {
    let after = rest.strip_prefix('r')?;
    let name_goes_on =
        before.chars().next_back().is_some_and(|c| c.is_alphanumeric() && c != 'b' || c == '_');
    let hashes = after.bytes().take_while(|b| *b == b'#').count();
    (!name_goes_on && after.as_bytes().get(hashes) == Some(&b'"')).then_some(hashes)
}

/// The length of the character literal that starts here; `None` for a lifetime.
fn character(rest: &str) -> Option<usize> {
    let mut chars = rest.char_indices().skip(1);
    let (_, first) = chars.next()?;
    if first == '\\' {
        return chars.skip(1).find(|(_, c)| *c == '\'').map(|(at, _)| at + 1);
    }
    chars.next().filter(|(_, c)| *c == '\'').map(|(at, _)| at + 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn code(text: &str) -> String {
        Source::parse(text).lines.iter().map(|line| line.code.as_str()).collect::<Vec<_>>().join("\n")
    }

    #[test]
    fn strings_characters_and_comments_are_not_code() {
        assert_eq!(code("a(\"x // \\\" y\") // c"), "a() ");
        assert_eq!(code("a(r#\"x \" y\"#, 'b', '\\'', '\"')"), "a(, , , )");
        assert_eq!(code("a /* b /* c */ d */ e"), "a  e");
        assert_eq!(code("fn f<'a>(x: &'a str) {}"), "fn f<a>(x: &a str) {}");
        assert_eq!(code("a(\"x\ny\", z)"), "a(\n, z)");
    }

    #[test]
    fn comments_keep_their_words() {
        assert_eq!(Source::parse("x(); // SAFETY: y").lines[0].comment, "// SAFETY: y");
    }
}
