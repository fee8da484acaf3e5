//! `GET /containers/{name}/logs`.

use bytes::Bytes;
use futures_util::StreamExt;
use http::Response;

use super::containers::pieces;
use crate::{
    api::{
        request::Call,
        response::{Body, streamed},
        router::{Route, table},
        stream::{media_type, stdcopy},
    },
    engine::{
        Error, Result,
        logs::{ReadOptions, Record},
    },
};

pub(super) const ROUTES: &[Route] = table! {
    GET "/containers/{name}/logs" [WhileConnected] => logs,
};

async fn logs(call: Call) -> Result<Response<Body>> {
    let query = &call.query;
    let flag = |name: &str| query.boolean(name, false);
    let options = ReadOptions {
        stdout: flag("stdout"),
        stderr: flag("stderr"),
        since: query.time("since")?,
        until: query.time("until")?.filter(|until| until.as_nanosecond() != 0),
        // Whatever is no number (`all`) means everything, and so does a negative one.
        tail: query.get("tail").and_then(|tail| tail.parse().ok()),
        follow: flag("follow"),
    };
    if !options.stdout && !options.stderr {
        return Err(Error::invalid("Bad parameters: you must choose at least one stream"));
    }
    let form = Form { terminal: false, timestamps: flag("timestamps"), details: flag("details") };
    let (terminal, records) = call.engine.container_logs(call.name(), options).await?;
    let form = Form { terminal, ..form };
    let lines = pieces(records).map(move |record| Ok(form.render(&record)));
    Ok(streamed(media_type(terminal, call.version), lines))
}

/// How a record goes out.
#[derive(Clone, Copy)]
struct Form {
    terminal: bool,
    timestamps: bool,
    details: bool,
}

impl Form {
    fn render(self, record: &Record) -> Bytes {
        let mut line = Vec::with_capacity(record.bytes.len() + 48);
        if self.timestamps {
            line.extend_from_slice(format!("{:.9} ", record.time).as_bytes());
        }
        if self.details {
            for (index, (name, value)) in record.attributes.iter().enumerate() {
                let comma = if index == 0 { "" } else { "," };
                line.extend_from_slice(
                    format!("{comma}{}={}", query_escape(name), query_escape(value)).as_bytes(),
                );
            }
            line.push(b' ');
        }
        line.extend_from_slice(&record.bytes);
        if self.terminal {
            return line.into();
        }
        let mut frame = Vec::with_capacity(line.len() + stdcopy::HEADER);
        stdcopy::frame(&mut frame, record.stream, &line);
        frame.into()
    }
}

/// As Go escapes a query's values.
fn query_escape(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for byte in text.bytes() {
        match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'_' | b'.' | b'~' => {
                escaped.push(char::from(byte));
            }
            b' ' => escaped.push('+'),
            _ => escaped.push_str(&format!("%{byte:02X}")),
        }
    }
    escaped
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::logs::Stream;

    #[test]
    fn records_in_every_form() {
        let record = Record {
            stream: Stream::Stderr,
            time: "2026-01-02T03:04:05.6Z".parse().unwrap(),
            bytes: Bytes::from_static(b"text\n"),
            attributes: [("a b".to_owned(), "1/2".to_owned()), ("c".to_owned(), "3".to_owned())].into(),
        };
        let render = |terminal, timestamps, details| Form { terminal, timestamps, details }.render(&record);
        assert_eq!(render(true, false, false), "text\n");
        assert_eq!(render(true, true, false), "2026-01-02T03:04:05.600000000Z text\n");
        assert_eq!(render(true, true, true), "2026-01-02T03:04:05.600000000Z a+b=1%2F2,c=3 text\n");
        assert_eq!(render(false, false, false), &b"\x02\0\0\0\0\0\0\x05text\n"[..]);
    }
}
