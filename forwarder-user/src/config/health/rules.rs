//! From the keys of a health check to a [`HealthCheck`]: which keys belong together, and what is not written.

use std::{
    net::{IpAddr, Ipv4Addr},
    time::Duration,
};

use super::{
    BodyMatch, HealthCheck, HttpProbe, Method, Probe, StatusRange, Trust, TunnelCheck,
    read::{Health, HealthKind, Pace, TunnelHealth},
};
use crate::{
    config::{
        reader::{OptionalField, Report, Reported},
        validate::{all, option, or, required},
    },
    error::Error,
};

const DEFAULT_INTERVAL: Duration = Duration::from_secs(2);
/// A tunnel is one target for all backends behind it, so it may be asked more often.
const DEFAULT_TUNNEL_INTERVAL: Duration = Duration::from_secs(1);
const DEFAULT_TIMEOUT: Duration = Duration::from_secs(1);
const DEFAULT_RISE: u32 = 2;
const DEFAULT_FALL: u32 = 3;
/// Gateways that started at the same moment drift apart by it.
const DEFAULT_JITTER_PERCENT: u32 = 10;
const DEFAULT_PATH: &str = "/";
const DEFAULT_EXPECT: StatusRange = StatusRange {
    first: 200,
    last: 399,
};

/// Where a key stands, if it is there.
fn place_of<T>(field: &OptionalField<T>) -> Option<usize> {
    Some(field.as_ref().ok()?.as_ref()?.at)
}

fn error(report: &Report, at: usize, what: String, hint: impl Into<String>) -> Reported {
    report.error(at, Error::usage(what).hint(hint))
}

/// The check of a group; `None` if its backends are not checked. `place` is what messages call it; `default` is the
/// kind where none is written.
pub fn group_check(
    report: &Report,
    place: &str,
    health: &Health,
    default: HealthKind,
) -> Result<Option<HealthCheck>, Reported> {
    let kind = or(&health.kind, default)?;
    if kind == HealthKind::None {
        // Whoever switches a check off for a while need not take it apart.
        return Ok(None);
    }
    keys_of_other_kinds(report, place, health, kind);
    let probe = match kind {
        HealthKind::None => return Ok(None),
        HealthKind::Tcp => Probe::Tcp,
        HealthKind::Icmp => Probe::Icmp,
        HealthKind::Http => Probe::Http(http(report, place, health)?),
        HealthKind::Https => Probe::Https(http(report, place, health)?, trust(report, place, health)?),
        HealthKind::Udp => Probe::Udp {
            send: text_or_hex(
                report,
                place,
                ("send", &health.send),
                ("send_hex", &health.send_hex),
            )?
            .unwrap_or_default(),
            answer: text_or_hex(
                report,
                place,
                ("answer", &health.answer),
                ("answer_hex", &health.answer_hex),
            )?,
        },
        HealthKind::Grpc => Probe::Grpc {
            service: or(&health.service, String::new())?,
            host: option(&health.host)?,
        },
        HealthKind::Command => Probe::Command(command(report, place, health)?),
    };
    Ok(Some(check(
        probe,
        &health.pace,
        DEFAULT_INTERVAL,
        option(&health.port)?,
    )?))
}

/// The check of a tunnel.
pub fn tunnel_check(report: &Report, place: &str, health: &TunnelHealth) -> Result<TunnelCheck, Reported> {
    let kind = or(&health.kind, HealthKind::Icmp)?;
    let port = option(&health.port)?;
    let address = required(&health.address)?;
    let at = health.address.as_ref().map_err(|reported| *reported)?.at;
    let is_broadcast = address == IpAddr::V4(Ipv4Addr::BROADCAST);
    if address.is_unspecified() || address.is_loopback() || address.is_multicast() || is_broadcast {
        let what = format!("{place}, health: {address} is not the address of a host behind the tunnel");
        return Err(error(
            report,
            at,
            what,
            "write the far side's own address inside the tunnel",
        ));
    }
    let probe = match (kind, place_of(&health.port)) {
        (HealthKind::Tcp, None) => {
            let what = format!("{place}, health: port is missing");
            return Err(error(
                report,
                at,
                what,
                "for example: port = 179. Without one, kind = \"icmp\" asks for an echo",
            ));
        }
        (HealthKind::Tcp, Some(_)) => Probe::Tcp,
        (_, Some(at)) => {
            let what = format!("{place}, health: port is for kind = \"tcp\" only");
            return Err(error(
                report,
                at,
                what,
                "write kind = \"tcp\" (without it the kind is \"icmp\"), or remove port",
            ));
        }
        (_, None) => Probe::Icmp,
    };
    Ok(TunnelCheck {
        address,
        check: check(probe, &health.pace, DEFAULT_TUNNEL_INTERVAL, port)?,
    })
}

fn check(probe: Probe, pace: &Pace, interval: Duration, port: Option<u16>) -> Result<HealthCheck, Reported> {
    Ok(HealthCheck {
        probe,
        interval: or(&pace.interval, interval)?,
        timeout: or(&pace.timeout, DEFAULT_TIMEOUT)?,
        rise: or(&pace.rise, DEFAULT_RISE)?,
        fall: or(&pace.fall, DEFAULT_FALL)?,
        jitter_percent: or(&pace.jitter_percent, DEFAULT_JITTER_PERCENT)?,
        port,
    })
}

/// Reports every key that does nothing for this kind.
fn keys_of_other_kinds(report: &Report, place: &str, health: &Health, kind: HealthKind) {
    use HealthKind::{Command, Grpc, Http, Https, Tcp, Udp};
    let http: &[HealthKind] = &[Http, Https];
    let keys: [(&str, Option<usize>, &[HealthKind]); 15] = [
        (
            "port",
            place_of(&health.port),
            &[Tcp, Http, Https, Udp, Grpc, Command],
        ),
        ("method", place_of(&health.method), http),
        ("path", place_of(&health.path), http),
        ("host", place_of(&health.host), &[Http, Https, Grpc]),
        ("expect", place_of(&health.expect), http),
        ("body", place_of(&health.body), http),
        ("body_regex", place_of(&health.body_regex), http),
        ("verify", place_of(&health.verify), &[Https]),
        ("ca", place_of(&health.ca), &[Https]),
        ("send", place_of(&health.send), &[Udp]),
        ("send_hex", place_of(&health.send_hex), &[Udp]),
        ("answer", place_of(&health.answer), &[Udp]),
        ("answer_hex", place_of(&health.answer_hex), &[Udp]),
        ("service", place_of(&health.service), &[Grpc]),
        ("command", place_of(&health.command), &[Command]),
    ];
    for (key, at, kinds) in keys {
        let Some(at) = at.filter(|_| !kinds.contains(&kind)) else {
            continue;
        };
        let words: Vec<String> = kinds.iter().map(|kind| format!("{:?}", kind.word())).collect();
        let (last, others) = words
            .split_last()
            .map_or(("", &[][..]), |(last, others)| (last, others));
        let kinds = if others.is_empty() {
            last.to_owned()
        } else {
            format!("{} or {last}", others.join(", "))
        };
        let now = if place_of(&health.kind).is_some() {
            format!("here it is {:?}", kind.word())
        } else {
            format!("without it the kind is {:?}", kind.word())
        };
        let first = words.first().map_or("", String::as_str);
        error(
            report,
            at,
            format!("{place}, health: {key} is for kind = {kinds} only"),
            format!("write kind = {first} ({now}), or remove {key}"),
        );
    }
}

fn http(report: &Report, place: &str, health: &Health) -> Result<HttpProbe, Reported> {
    let method = or(&health.method, Method::Get)?;
    let body = match (option(&health.body)?, option(&health.body_regex)?) {
        (Some(_), Some(_)) => {
            let at = place_of(&health.body_regex).unwrap_or_default();
            let what = format!("{place}, health: body and body_regex exclude each other");
            return Err(error(report, at, what, "keep the one that says what you mean"));
        }
        (Some(text), None) => Some(BodyMatch::Text(text)),
        (None, pattern) => pattern.map(BodyMatch::Pattern),
    };
    if let (Some(at), Method::Head) = (place_of(&health.body).or(place_of(&health.body_regex)), method) {
        let what = format!("{place}, health: an answer to HEAD has no body to match");
        return Err(error(report, at, what, "write method = \"GET\""));
    }
    Ok(HttpProbe {
        method,
        path: or(&health.path, DEFAULT_PATH.to_owned())?,
        host: option(&health.host)?,
        expect: match &health.expect {
            Ok(Some(expect)) => all(&expect.value)?,
            Ok(None) => vec![DEFAULT_EXPECT],
            Err(reported) => return Err(*reported),
        },
        body,
    })
}

fn trust(report: &Report, place: &str, health: &Health) -> Result<Trust, Reported> {
    Ok(match (option(&health.verify)?, option(&health.ca)?) {
        (Some(false), Some(_)) => {
            let at = place_of(&health.ca).unwrap_or_default();
            let what = format!("{place}, health: ca has no use with verify = false");
            return Err(error(report, at, what, "write verify = true, or remove ca"));
        }
        (_, Some(file)) => Trust::File(file),
        (Some(true), None) => Trust::Host,
        (Some(false) | None, None) => Trust::Anyone,
    })
}

/// Bytes that are written as text or in hexadecimal.
fn text_or_hex(
    report: &Report,
    place: &str,
    (text_key, text): (&str, &OptionalField<Vec<u8>>),
    (hex_key, hex): (&str, &OptionalField<Vec<u8>>),
) -> Result<Option<Vec<u8>>, Reported> {
    match (option(text)?, option(hex)?) {
        (Some(_), Some(_)) => {
            let at = place_of(hex).unwrap_or_default();
            let what = format!("{place}, health: {text_key} and {hex_key} exclude each other");
            Err(error(
                report,
                at,
                what,
                format!("keep {text_key} for text, {hex_key} for bytes"),
            ))
        }
        (text, hex) => Ok(text.or(hex)),
    }
}

fn command(report: &Report, place: &str, health: &Health) -> Result<Vec<String>, Reported> {
    const EXAMPLE: &str = "for example: command = [\"/usr/local/bin/check-db\", \"--fast\"]";
    let (words, at) = match &health.command {
        Ok(Some(command)) => (all(&command.value)?, command.at),
        Ok(None) => {
            let at = place_of(&health.kind).unwrap_or_default();
            return Err(error(
                report,
                at,
                format!("{place}, health: command is missing"),
                EXAMPLE,
            ));
        }
        Err(reported) => return Err(*reported),
    };
    if words.first().is_some_and(|program| program.starts_with('/')) {
        return Ok(words);
    }
    let what = format!("{place}, health: the first entry of command must be an absolute path");
    Err(error(report, at, what, EXAMPLE))
}
