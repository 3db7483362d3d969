//! The keys of `[group.NAME.health]` and `[tunnel.NAME.health]`, and the type and range of each value.

use std::{net::IpAddr, ops::RangeInclusive, path::PathBuf, time::Duration};

use toml::de::DeValue;

use super::{Method, Pattern, StatusRange};
use crate::config::{
    reader::{Field, OptionalField, Shape, Table, Wrong, integer, number, one_of},
    schema::{PORT, absolute_path, address, boolean, duration},
};

/// Entries of `expect`.
pub const EXPECTATIONS: RangeInclusive<usize> = 1..=32;
/// Range of `interval`, in milliseconds.
pub const INTERVAL_MS: RangeInclusive<u64> = 100..=300_000;
/// Range of `timeout`, in milliseconds.
pub const TIMEOUT_MS: RangeInclusive<u64> = 50..=300_000;
/// Range of `rise` and `fall`.
pub const THRESHOLD: RangeInclusive<u32> = 1..=10;
/// Range of `jitter`, in percent. With more, two probes could come together.
pub const JITTER_PERCENT: RangeInclusive<u32> = 0..=25;
/// Status codes of HTTP (RFC 9110 §15: three digits, the first of which is 1 to 5).
pub const STATUS: RangeInclusive<u16> = 100..=599;
/// Length of `send` and `answer`, in bytes: fits a datagram on any path.
pub const PAYLOAD_BYTES: RangeInclusive<usize> = 1..=1024;
/// Length of `body`, `body_regex` and `service`, in bytes.
pub const TEXT_BYTES: RangeInclusive<usize> = 1..=1024;
/// Entries of `command`: a program and its arguments.
pub const WORDS: RangeInclusive<usize> = 1..=64;
/// What a compiled `body_regex` may take, in bytes.
const PATTERN_BYTES: usize = 1 << 20;

/// `[group.NAME.health]`
pub const HEALTH: Shape = Shape {
    header: "group.NAME.health",
    keys: &[
        "kind",
        "port",
        "method",
        "path",
        "host",
        "expect",
        "body",
        "body_regex",
        "verify",
        "ca",
        "send",
        "send_hex",
        "answer",
        "answer_hex",
        "service",
        "command",
        "interval",
        "timeout",
        "rise",
        "fall",
        "jitter",
    ],
};

/// `[tunnel.NAME.health]`
pub const TUNNEL_HEALTH: Shape = Shape {
    header: "tunnel.NAME.health",
    keys: &[
        "kind", "address", "port", "interval", "timeout", "rise", "fall", "jitter",
    ],
};

/// What a health check sends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HealthKind {
    Tcp,
    Http,
    Https,
    Udp,
    Grpc,
    Icmp,
    Command,
    /// Nothing: backends are taken as healthy.
    None,
}

/// The words of `kind`.
pub const KINDS: [(&str, HealthKind); 8] = [
    ("tcp", HealthKind::Tcp),
    ("http", HealthKind::Http),
    ("https", HealthKind::Https),
    ("udp", HealthKind::Udp),
    ("grpc", HealthKind::Grpc),
    ("icmp", HealthKind::Icmp),
    ("command", HealthKind::Command),
    ("none", HealthKind::None),
];

impl HealthKind {
    /// The word of `kind`.
    pub fn word(self) -> &'static str {
        KINDS
            .iter()
            .find(|(_, kind)| *kind == self)
            .map_or("", |(word, _)| word)
    }
}

/// When probes start and what turns health; of both tables.
#[derive(Clone, Debug)]
pub struct Pace {
    pub interval: OptionalField<Duration>,
    pub timeout: OptionalField<Duration>,
    pub rise: OptionalField<u32>,
    pub fall: OptionalField<u32>,
    pub jitter_percent: OptionalField<u32>,
}

impl Pace {
    fn read(table: &Table<'_>) -> Self {
        Self {
            interval: table.optional("interval", duration(INTERVAL_MS)),
            timeout: table.optional("timeout", duration(TIMEOUT_MS)),
            rise: table.optional("rise", integer(THRESHOLD)),
            fall: table.optional("fall", integer(THRESHOLD)),
            jitter_percent: table.optional("jitter", percent(JITTER_PERCENT)),
        }
    }
}

/// `[group.NAME.health]`
#[derive(Clone, Debug)]
pub struct Health {
    pub kind: OptionalField<HealthKind>,
    pub port: OptionalField<u16>,
    pub method: OptionalField<Method>,
    pub path: OptionalField<String>,
    pub host: OptionalField<String>,
    pub expect: OptionalField<Vec<Field<StatusRange>>>,
    pub body: OptionalField<String>,
    pub body_regex: OptionalField<Pattern>,
    pub verify: OptionalField<bool>,
    pub ca: OptionalField<PathBuf>,
    pub send: OptionalField<Vec<u8>>,
    pub send_hex: OptionalField<Vec<u8>>,
    pub answer: OptionalField<Vec<u8>>,
    pub answer_hex: OptionalField<Vec<u8>>,
    pub service: OptionalField<String>,
    pub command: OptionalField<Vec<Field<String>>>,
    pub pace: Pace,
}

impl Health {
    pub fn read(table: &Table<'_>) -> Self {
        Self {
            kind: table.optional("kind", one_of(&KINDS)),
            port: table.optional("port", integer(PORT)),
            method: table.optional(
                "method",
                one_of(&[
                    ("GET", Method::Get),
                    ("HEAD", Method::Head),
                    ("OPTIONS", Method::Options),
                    ("POST", Method::Post),
                ]),
            ),
            path: table.optional("path", http_path),
            host: table.optional("host", http_host),
            expect: table.optional_list("expect", EXPECTATIONS, status_range),
            body: table.optional("body", text(TEXT_BYTES)),
            body_regex: table.optional("body_regex", pattern),
            verify: table.optional("verify", boolean),
            ca: table.optional("ca", absolute_path),
            send: table.optional("send", payload),
            send_hex: table.optional("send_hex", hex_payload),
            answer: table.optional("answer", payload),
            answer_hex: table.optional("answer_hex", hex_payload),
            service: table.optional("service", service),
            command: table.optional_list("command", WORDS, word),
            pace: Pace::read(table),
        }
    }
}

/// `[tunnel.NAME.health]`
#[derive(Clone, Debug)]
pub struct TunnelHealth {
    pub kind: OptionalField<HealthKind>,
    pub address: Field<IpAddr>,
    pub port: OptionalField<u16>,
    pub pace: Pace,
}

impl TunnelHealth {
    pub fn read(table: &Table<'_>) -> Self {
        let kinds = one_of(&[("icmp", HealthKind::Icmp), ("tcp", HealthKind::Tcp)]);
        Self {
            kind: table.optional("kind", kinds),
            address: table.required("address", "\"169.254.42.2\"", address),
            port: table.optional("port", integer(PORT)),
            pace: Pace::read(table),
        }
    }
}

/// Visible ASCII, so that it can stand in a request line or header (RFC 9110 §5.5, RFC 9112 §3).
fn is_visible(text: &str) -> bool {
    !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_graphic())
}

fn http_path(value: &DeValue<'_>) -> Result<String, Wrong> {
    let path = value
        .as_str()
        .filter(|path| path.starts_with('/') && is_visible(path) && !path.contains('#'));
    path.map(str::to_owned).ok_or_else(|| {
        Wrong::must_be("a path that starts with \"/\" and has no space or \"#\"")
            .hint("percent-encode such characters")
    })
}

fn http_host(value: &DeValue<'_>) -> Result<String, Wrong> {
    let host = value
        .as_str()
        .filter(|host| is_visible(host) && !host.contains(['/', '@', '?', '#']));
    host.map(str::to_owned)
        .ok_or_else(|| Wrong::must_be("a host name such as \"example.org\""))
}

/// A service of gRPC: what stands in a request may be any text, but names are visible ASCII.
fn service(value: &DeValue<'_>) -> Result<String, Wrong> {
    let name = value
        .as_str()
        .filter(|name| is_visible(name) && TEXT_BYTES.contains(&name.len()));
    name.map(str::to_owned)
        .ok_or_else(|| Wrong::must_be("the name of a gRPC service such as \"shop.Cart\""))
}

/// `200`, `"200"` or `"200-399"`.
fn status_range(value: &DeValue<'_>) -> Result<StatusRange, Wrong> {
    let ends = match value {
        DeValue::Integer(code) => number(code).map(|code| (code, code)),
        DeValue::String(text) => {
            let (first, last) = text.split_once('-').unwrap_or((text, text));
            first.trim().parse().ok().zip(last.trim().parse().ok())
        }
        _ => None,
    };
    let range = ends.map(|(first, last)| StatusRange { first, last });
    range
        .filter(|range| {
            STATUS.contains(&range.first) && STATUS.contains(&range.last) && range.first <= range.last
        })
        .ok_or_else(|| Wrong::must_be("a status code or range within 100 to 599, such as 200 or \"200-399\""))
}

/// A text of so many bytes.
fn text(length_bytes: RangeInclusive<usize>) -> impl Fn(&DeValue<'_>) -> Result<String, Wrong> {
    move |value| {
        let text = value.as_str().filter(|text| length_bytes.contains(&text.len()));
        text.map(str::to_owned).ok_or_else(|| {
            let (first, last) = (length_bytes.start(), length_bytes.end());
            Wrong::must_be(format!("a text of {first} to {last} bytes"))
        })
    }
}

fn payload(value: &DeValue<'_>) -> Result<Vec<u8>, Wrong> {
    text(PAYLOAD_BYTES)(value).map(String::into_bytes)
}

/// Bytes as hexadecimal digits, with spaces where one likes.
fn hex_payload(value: &DeValue<'_>) -> Result<Vec<u8>, Wrong> {
    let bytes = value.as_str().and_then(|text| {
        let digits: String = text.chars().filter(|c| !c.is_ascii_whitespace()).collect();
        hex::decode(digits).ok()
    });
    bytes
        .filter(|bytes| PAYLOAD_BYTES.contains(&bytes.len()))
        .ok_or_else(|| {
            let (first, last) = (PAYLOAD_BYTES.start(), PAYLOAD_BYTES.end());
            Wrong::must_be(format!(
                "{first} to {last} bytes in hexadecimal, such as \"0d 0a\""
            ))
        })
}

fn pattern(value: &DeValue<'_>) -> Result<Pattern, Wrong> {
    let text = text(TEXT_BYTES)(value)?;
    let compiled = regex::bytes::RegexBuilder::new(&text)
        .size_limit(PATTERN_BYTES)
        .build();
    compiled.map(Pattern).map_err(|error| {
        // The last line says what is wrong, those before it draw where.
        let message = error.to_string();
        let last = message.lines().next_back().unwrap_or_default();
        let why = last.strip_prefix("error: ").unwrap_or(last);
        Wrong::must_be("a regular expression").hint(why)
    })
}

/// A word of a command; the kernel ends each with a zero byte.
fn word(value: &DeValue<'_>) -> Result<String, Wrong> {
    let word = value.as_str().filter(|word| !word.contains('\0'));
    word.map(str::to_owned)
        .ok_or_else(|| Wrong::must_be("a text without zero bytes"))
}

/// `"10%"`.
fn percent(range: RangeInclusive<u32>) -> impl Fn(&DeValue<'_>) -> Result<u32, Wrong> {
    move |value| {
        let wrong = || {
            let (first, last) = (range.start(), range.end());
            Wrong::must_be(format!("a share of the interval from {first}% to {last}%"))
        };
        if let DeValue::Integer(number) = value {
            return Err(wrong().hint(format!("write it with its unit: \"{number}%\"")));
        }
        let digits = value.as_str().and_then(|text| text.strip_suffix('%'));
        digits
            .filter(|digits| digits.bytes().all(|byte| byte.is_ascii_digit()))
            .and_then(|digits| digits.parse().ok())
            .filter(|percent| range.contains(percent))
            .ok_or_else(wrong)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn value(text: &str) -> DeValue<'_> {
        DeValue::parse(text).unwrap().into_inner()
    }

    #[test]
    fn status_codes_are_numbers_or_ranges() {
        let read = |text| {
            status_range(&value(text))
                .ok()
                .map(|range| (range.first, range.last))
        };
        assert_eq!(read("200"), Some((200, 200)));
        assert_eq!(read(r#""204""#), Some((204, 204)));
        assert_eq!(read(r#""200-399""#), Some((200, 399)));
        for wrong in [
            "99",
            "600",
            r#""399-200""#,
            r#""200-""#,
            r#""2xx""#,
            r#""""#,
            "true",
        ] {
            assert_eq!(read(wrong), None, "{wrong}");
        }
    }

    #[test]
    fn shares_have_their_unit() {
        let read = |text| percent(JITTER_PERCENT)(&value(text)).ok();
        assert_eq!((read(r#""0%""#), read(r#""25%""#)), (Some(0), Some(25)));
        for wrong in [
            "10", r#""10""#, r#""26%""#, r#""+5%""#, r#""5 %""#, r#""%""#, "0.1",
        ] {
            assert_eq!(read(wrong), None, "{wrong}");
        }
    }

    #[test]
    fn bytes_are_hexadecimal_digits_in_pairs() {
        let read = |text| hex_payload(&value(text)).ok();
        assert_eq!(read(r#""00 ff0A""#), Some(vec![0, 255, 10]));
        for wrong in [r#""""#, r#""0""#, r#""0x00""#, r#""zz""#, "12"] {
            assert_eq!(read(wrong), None, "{wrong}");
        }
        let long = format!("\"{}\"", "00".repeat(PAYLOAD_BYTES.end() + 1));
        assert_eq!(read(&long), None);
    }

    #[test]
    fn a_pattern_that_is_none_says_why() {
        assert!(pattern(&value(r#""^ok""#)).is_ok());
        let wrong = pattern(&value(r#""ok(""#)).unwrap_err();
        assert!(format!("{wrong:?}").contains("unclosed group"), "{wrong:?}");
        assert!(pattern(&value(r#""(\\w{500}){500}""#)).is_err(), "too large");
    }
}
