//! `forwarder status`: what the running agent knows, from its control socket.
//!
//! Draws the agent's [`Status`] for people, or prints it as JSON. Asks and changes nothing else.

use std::path::Path;

use anstyle::Style;
use forwarder_common::abi::reason::DESCRIPTIONS;

use super::{
    args::{OutputFormat, StatusArgs},
    ask,
    drain::progress,
    output,
    table::{Align, lines},
};
use crate::{
    api::STATUS_PATH,
    config::{
        address::all_at_port,
        validate::{DEFAULT_CONTROL_SOCKET, DEFAULT_PIN_DIRECTORY},
    },
    datapath::left_behind::{self, LeftBehind},
    error::{EXIT_UNATTENDED, Error, Errors},
    status::{
        BackendStatus, DiagnosisStatus, EjectionStatus, GroupStatus, ListenerStatus, PoolStatus, Rates,
        Status, TunnelStatus,
    },
};

/// From which share on the pool's use is worth a remark.
const POOL_NEARLY_USED: f64 = 0.8;

const TITLE: Style = Style::new().bold();

/// Asks the agent and prints its answer.
///
/// # Errors
/// No agent answers, rights are missing, or the answer can't be written.
pub fn status(args: &StatusArgs) -> Result<(), Errors> {
    let socket = &args.agent.socket;
    let status = ask::get(socket, STATUS_PATH).map_err(|error| {
        let default_pins =
            (socket == Path::new(DEFAULT_CONTROL_SOCKET)).then_some(Path::new(DEFAULT_PIN_DIRECTORY));
        match left_behind::of_socket(socket, default_pins) {
            Some(found) if !ask::is_running(socket) => unattended(&found),
            _ => error,
        }
    })?;
    match args.output.output {
        OutputFormat::Text => output::text(&draw(&status))?,
        OutputFormat::Json => output::json(&status)?,
    }
    Ok(())
}

/// What it means that nobody answers, although the data path is there.
fn unattended(found: &LeftBehind) -> Error {
    let directory = found.pin_directory.display();
    let agent = match &found.agent {
        Some(pid) => format!("process {pid}"),
        None => "unknown".to_owned(),
    };
    if let Some(holder) = &found.holder {
        return Error::failed(format!(
            "the agent that holds the pins in {directory} (process {holder}) does not answer: it starts, stops, or hangs"
        ))
        .hint("wait a moment; if that stays so, see its log: `journalctl -u forwarder`");
    }
    let since = match found.silent_for {
        Some(time) => format!("for {}", duration(time.as_secs())),
        None => "since a time that is not known".to_owned(),
    };
    let attached: Vec<_> = found
        .interfaces
        .iter()
        .map(|(name, kind)| format!("{name} ({})", kind.name()))
        .collect();
    let attached = if attached.is_empty() {
        "nothing".to_owned()
    } else {
        attached.join(", ")
    };
    Error {
        exit_code: EXIT_UNATTENDED,
        ..Error::failed(format!(
            "no agent runs, but its data path does: it has been without one {since}\n  \
             pinned in {directory}, attached to {attached}; the last agent: {agent}\n  \
             open and new connections are forwarded. Nobody checks health, so a backend that fails keeps its share; nobody\n  \
             ends idle flows, so they keep their bindings; nobody follows changes of routes, and there are no metrics"
        ))
    }
    .hint(format!(
        "`systemctl start forwarder`, or `forwarder run -c FILE`, takes it over, and flows go on; \
         `forwarder detach --pin-directory {directory}` ends it, and all flows"
    ))
}

/// The status as text for a terminal.
fn draw(status: &Status) -> String {
    let mut text = vec![format!(
        "forwarder {}, up {}; IN and OUT are bytes of requests and replies",
        status.version,
        duration(status.uptime_secs)
    )];
    let mut section = |title: &str, lines: Vec<String>| {
        if !lines.is_empty() {
            text.push(String::new());
            text.push(format!("{TITLE}{title}{TITLE:#}"));
            text.extend(lines);
        }
    };
    section("Warnings", status.warnings.clone());
    section("Listeners", listeners(status));
    for group in &status.groups {
        section(&group_title(group), backends(group));
    }
    section("Left the configuration", leaving(status));
    section("SNAT pool", pool(status.pool));
    section("Tunnels", tunnels(status));
    section("Interfaces", interfaces(status));
    section("Drops since the start", drops(status));
    text.join("\n")
}

fn listeners(status: &Status) -> Vec<String> {
    let columns = [
        ("LISTENER", Align::Left),
        ("ADDRESS", Align::Left),
        ("GROUP", Align::Left),
        ("FLOWS", Align::Right),
        ("NEW/S", Align::Right),
        ("IN/S", Align::Right),
        ("OUT/S", Align::Right),
        ("REFUSED", Align::Right),
    ];
    let row = |listener: &ListenerStatus| {
        let traffic = &listener.traffic;
        let Rates {
            connections,
            bytes_in,
            bytes_out,
            ..
        } = traffic.rates;
        [
            listener.name.clone(),
            format!(
                "{}/{}",
                all_at_port(&listener.vips, &listener.port),
                listener.protocol
            ),
            listener.group.clone(),
            traffic.flows.to_string(),
            rate(connections),
            byte_rate(bytes_in),
            byte_rate(bytes_out),
            traffic.connections_refused.to_string(),
        ]
    };
    let mut table = lines(columns, status.listeners.iter().map(row).collect()).into_iter();
    let mut text: Vec<String> = table.next().into_iter().collect();
    for (line, listener) in table.zip(&status.listeners) {
        text.push(line);
        text.extend(guards(listener).into_iter().map(|guard| format!("  {guard}")));
    }
    text
}

/// What cookies and a rate for sources do for a listener, if it has any.
pub(crate) fn guards(listener: &ListenerStatus) -> Vec<String> {
    let mut text = Vec::new();
    if let Some(when) = &listener.syn_cookies {
        let when = match when.as_str() {
            "always" => "always".to_owned(),
            above => format!("beyond {above} flows/s"),
        };
        let now = match listener.cookies_sent_rate {
            0.0 => "none".to_owned(),
            sent => format!("{}/s", rate(sent)),
        };
        let flood = if listener.is_flooded() { ", a flood" } else { "" };
        text.push(format!(
            "SYN cookies {when}: {now} now{flood}; {} sent, {} accepted, {} refused",
            listener.cookies_sent, listener.cookies_accepted, listener.cookies_invalid
        ));
    }
    if let Some(most) = listener.source_rate {
        text.push(format!(
            "at most {most} new flows/s of a source: {} dropped",
            listener.flows_limited
        ));
    }
    text
}

fn group_title(group: &GroupStatus) -> String {
    let nat = match group.nat.as_str() {
        "full" => "full NAT",
        "dnat" => "DNAT",
        other => other,
    };
    let all = group.backends.len();
    format!(
        "Group {} ({nat}): {} of {all} {} healthy",
        group.name,
        group.healthy_backends,
        if all == 1 { "backend" } else { "backends" }
    )
}

/// One line per backend, and below it what is wrong with it.
fn backends(group: &GroupStatus) -> Vec<String> {
    let columns = [
        ("BACKEND", Align::Left),
        ("ADDRESS", Align::Left),
        ("HEALTH", Align::Left),
        ("SHARE", Align::Right),
        ("FLOWS", Align::Right),
        ("NEW/S", Align::Right),
        ("IN/S", Align::Right),
        ("OUT/S", Align::Right),
        ("OPENED", Align::Right),
    ];
    let row = |backend: &BackendStatus| {
        let traffic = &backend.traffic;
        let Rates {
            connections,
            bytes_in,
            bytes_out,
            ..
        } = traffic.rates;
        [
            backend.name.clone(),
            backend.endpoint(),
            backend.health.clone(),
            share(backend.share),
            traffic.flows.to_string(),
            rate(connections),
            byte_rate(bytes_in),
            byte_rate(bytes_out),
            traffic.connections_opened.to_string(),
        ]
    };
    let mut table = lines(columns, group.backends.iter().map(row).collect()).into_iter();
    let mut text: Vec<String> = table.next().into_iter().collect();
    for (line, backend) in table.zip(&group.backends) {
        text.push(line);
        text.extend(trouble(backend));
    }
    text
}

/// What is not as usual with a backend: orders, why it does not answer, what to do.
pub(crate) fn trouble(backend: &BackendStatus) -> Vec<String> {
    let mut text = Vec::new();
    if let Some(EjectionStatus {
        cause,
        remaining_secs,
        times,
    }) = &backend.ejection
    {
        let what = match cause.as_str() {
            "rejected" => "it answered new flows with TCP resets",
            _ => "nothing came back from it",
        };
        let again = if *times > 1 {
            format!(", {times} times in a row")
        } else {
            String::new()
        };
        let left = if *remaining_secs > 0.0 {
            format!("{} left", duration(remaining_secs.ceil() as u64))
        } else {
            "back with the next probe that passes".to_owned()
        };
        text.push(format!("  ejected{again}: {what}; {left}"));
    }
    if let Some(drain) = &backend.drain {
        text.push(format!("  {}", progress(drain)));
    }
    if let Some(percent) = backend.slow_start_percent {
        text.push(format!("  slow start, {percent}% of its weight"));
    }
    if let Some(weight) = backend.ordered_weight {
        text.push(format!(
            "  weight {weight} by order, {} as configured",
            backend.weight
        ));
    }
    text.extend(explanation(
        backend.diagnosis.as_ref(),
        backend.failure.as_deref(),
    ));
    text
}

pub(crate) fn explanation(diagnosis: Option<&DiagnosisStatus>, failure: Option<&str>) -> Vec<String> {
    let mut text = Vec::new();
    match (diagnosis, failure) {
        (
            Some(DiagnosisStatus {
                cause,
                text: why,
                hint,
            }),
            _,
        ) => {
            text.push(format!("  {cause}: {why}"));
            text.extend(hint.as_ref().map(|hint| format!("  hint: {hint}")));
        }
        (None, Some(failure)) => text.push(format!("  last probe: {failure}")),
        (None, None) => {}
    }
    text
}

/// Backends whose flows go on although they are not configured any more.
fn leaving(status: &Status) -> Vec<String> {
    let line = |backend: &crate::status::LeavingStatus| {
        let flows = backend.flows_left;
        let plural = if flows == 1 { "" } else { "s" };
        format!(
            "{}/{}: draining, {flows} flow{plural} left",
            backend.group, backend.name
        )
    };
    status.leaving_backends.iter().map(line).collect()
}

fn pool(pool: PoolStatus) -> Vec<String> {
    let PoolStatus { capacity, used, .. } = pool;
    let mut text = vec![format!(
        "{used} of {capacity} bindings in use ({:.1}%)",
        pool.usage() * 100.0
    )];
    if pool.usage() >= POOL_NEARLY_USED {
        text.push(
            "hint: when all are in use, new flows are refused: raise agent.max_flows, add a prefix to [snat], or \
             shorten idle timeouts"
                .to_owned(),
        );
    }
    text
}

/// One line per tunnel, and below it what is wrong with it.
fn tunnels(status: &Status) -> Vec<String> {
    let columns = [
        ("TUNNEL", Align::Left),
        ("MODE", Align::Left),
        ("LINK", Align::Left),
        ("FAR SIDE", Align::Left),
        ("HEALTH", Align::Left),
        ("BACKENDS HELD", Align::Right),
    ];
    let row = |tunnel: &TunnelStatus| {
        [
            tunnel.name.clone(),
            tunnel.mode.clone(),
            if tunnel.is_up { "up" } else { "down" }.to_owned(),
            tunnel
                .address
                .map_or_else(|| "-".to_owned(), |address| address.to_string()),
            tunnel.health.clone(),
            tunnel.backends_held.to_string(),
        ]
    };
    let mut table = lines(columns, status.tunnels.iter().map(row).collect()).into_iter();
    let mut text: Vec<String> = table
        .next()
        .into_iter()
        .filter(|_| !status.tunnels.is_empty())
        .collect();
    for (line, tunnel) in table.zip(&status.tunnels) {
        text.push(line);
        text.extend(
            tunnel
                .why_kernel
                .as_ref()
                .map(|why| format!("  kernel mode: {why}")),
        );
        text.extend(explanation(tunnel.diagnosis.as_ref(), tunnel.failure.as_deref()));
    }
    text
}

fn interfaces(status: &Status) -> Vec<String> {
    let columns = [
        ("INTERFACE", Align::Left),
        ("STATE", Align::Left),
        ("ATTACHED", Align::Left),
        ("SENT BY", Align::Left),
    ];
    let row = |interface: &crate::status::InterfaceStatus| {
        [
            interface.name.clone(),
            if interface.is_up { "up" } else { "down" }.to_owned(),
            interface.attachment.clone(),
            if interface.sends { "data path" } else { "stack" }.to_owned(),
        ]
    };
    lines(columns, status.interfaces.iter().map(row).collect())
}

/// The reasons that packets were dropped for, with what to do about them.
fn drops(status: &Status) -> Vec<String> {
    let dropped: Vec<_> = status
        .reasons
        .iter()
        .filter(|reason| reason.verdict == "drop" && reason.packets > 0)
        .collect();
    if dropped.is_empty() {
        return vec!["none".to_owned()];
    }
    let columns = [("REASON", Align::Left), ("PACKETS", Align::Right)];
    let row = |reason: &&crate::status::ReasonStatus| [reason.name.clone(), reason.packets.to_string()];
    let mut table = lines(columns, dropped.iter().map(row).collect()).into_iter();
    let mut text: Vec<String> = table.next().into_iter().collect();
    for (line, reason) in table.zip(&dropped) {
        text.push(line);
        // An agent of another version may know reasons that this program does not.
        if let Some(known) = DESCRIPTIONS.iter().find(|known| known.name == reason.name) {
            text.push(format!("  {}", known.text));
            if !known.hint.is_empty() {
                text.push(format!("  hint: {}", known.hint));
            }
        }
    }
    text
}

/// A share of 0 to 1 in percent, short.
pub(crate) fn share(share: f64) -> String {
    let percent = share * 100.0;
    // Not 100.0, which 99.95 would be rounded to.
    let digits = usize::from(percent < 99.95);
    format!("{percent:.digits$}%")
}

/// A number per second, short.
pub(crate) fn rate(rate: f64) -> String {
    if rate > 0.0 && rate < 100.0 {
        format!("{rate:.1}")
    } else {
        format!("{rate:.0}")
    }
}

/// Bytes per second, short, with the SI prefix that fits (k is 1000).
pub(crate) fn byte_rate(rate: f64) -> String {
    let mut rate = rate;
    for prefix in ["", "k", "M", "G"] {
        // Not 1000, which 999.95 would be rounded to.
        if rate < 999.5 {
            let digits = usize::from(!prefix.is_empty() && rate < 99.5);
            return format!("{rate:.digits$}{prefix}");
        }
        rate /= 1000.0;
    }
    format!("{rate:.1}T")
}

/// A duration in its two largest units.
pub(crate) fn duration(secs: u64) -> String {
    let (days, hours, minutes) = (secs / 86_400, secs / 3600 % 24, secs / 60 % 60);
    match (days, hours, minutes) {
        (0, 0, 0) => format!("{secs} s"),
        (0, 0, _) => format!("{minutes} min {} s", secs % 60),
        (0, ..) => format!("{hours} h {minutes} min"),
        _ => format!("{days} d {hours} h"),
    }
}

#[cfg(test)]
mod tests {
    use anstream::adapter::strip_str;

    use std::time::Duration;

    use super::*;
    use crate::{
        datapath::attach::AttachmentKind,
        status::testing::{assert_same_as_file, sample},
    };

    fn plain(status: &Status) -> String {
        strip_str(&draw(status)).to_string()
    }

    #[test]
    fn the_text_is_as_expected() {
        assert_same_as_file("tests/golden/status/text.txt", &(plain(&sample()) + "\n"));
    }

    #[test]
    fn guards_of_a_listener_are_told_where_it_has_them() {
        let mut status = sample();
        let [dns, web] = status.listeners.as_mut_slice() else {
            panic!("two listeners");
        };
        assert_eq!(guards(dns), Vec::<String>::new());
        assert_eq!(
            guards(web),
            [
                "SYN cookies beyond 2000 flows/s: 2700/s now, a flood; 81000 sent, 900 accepted, 14 refused",
                "at most 100 new flows/s of a source: 7 dropped",
            ]
        );
        web.cookies_sent_rate = 0.0;
        assert!(guards(web)[0].starts_with("SYN cookies beyond 2000 flows/s: none now; 81000 sent"));
        // Who always sends cookies is not under a flood for that.
        (web.syn_cookies, web.cookies_sent_rate) = (Some("always".to_owned()), 0.5);
        assert!(guards(web)[0].starts_with("SYN cookies always: 0.5/s now; 81000 sent"));
    }

    #[test]
    fn a_gateway_without_trouble_is_quiet() {
        let mut status = sample();
        status.warnings.clear();
        for reason in &mut status.reasons {
            (reason.packets, reason.bytes) = (0, 0);
        }
        let text = plain(&status);
        assert!(!text.contains("Warnings"), "{text}");
        assert!(text.ends_with("Drops since the start\nnone"), "{text}");
    }

    #[test]
    fn a_pool_that_runs_out_is_remarked_on_before_it_does() {
        assert_eq!(pool(sample().pool).len(), 1);
        let full = PoolStatus {
            capacity: 10,
            used: 8,
            free: 2,
        };
        assert!(pool(full)[1].starts_with("hint: "));
    }

    #[test]
    fn a_failure_without_a_diagnosis_is_shown() {
        let mut backend = sample().groups[1].backends[1].clone();
        backend.diagnosis = None;
        backend.ejection = None;
        assert_eq!(trouble(&backend), ["  last probe: no connection within 1s"]);
    }

    #[test]
    fn tables_fit_80_columns_with_ordinary_names() {
        // Sentences and hints are as long as they are: commands in them are to be copied.
        for line in plain(&sample()).lines().filter(|line| !line.contains(": ")) {
            assert!(line.chars().count() <= 80, "{line}");
        }
    }

    #[test]
    fn rates_and_durations_are_short() {
        let rates = [0.0, 0.4, 99.94, 100.0, 123_456.0].map(rate);
        assert_eq!(rates, ["0", "0.4", "99.9", "100", "123456"]);
        let bytes = [0.0, 999.0, 999.9, 12_600.0, 369_000.0, 999_600.0, 2.5e9, 1.2e13].map(byte_rate);
        assert_eq!(
            bytes,
            ["0", "999", "1.0k", "12.6k", "369k", "1.0M", "2.5G", "12.0T"]
        );
        let durations = [0, 59, 61, 3_661, 93_784].map(duration);
        assert_eq!(durations, ["0 s", "59 s", "1 min 1 s", "1 h 1 min", "1 d 2 h"]);
    }

    #[test]
    fn a_data_path_without_an_agent_is_told_plainly() {
        let mut found = LeftBehind {
            pin_directory: "/sys/fs/bpf/forwarder".into(),
            interfaces: vec![
                ("eth0".to_owned(), AttachmentKind::XdpNative),
                ("interface 7".to_owned(), AttachmentKind::Tcx),
            ],
            agent: Some("4711".to_owned()),
            holder: None,
            silent_for: Some(Duration::from_secs(182)),
        };
        let error = unattended(&found);
        assert_eq!(error.exit_code, EXIT_UNATTENDED);
        let text = error.to_string();
        for words in [
            "no agent runs, but its data path does: it has been without one for 3 min 2 s\n",
            "pinned in /sys/fs/bpf/forwarder, attached to eth0 (xdp-native), interface 7 (tcx); the last agent: process 4711",
            "Nobody checks health",
            "`forwarder detach --pin-directory /sys/fs/bpf/forwarder`",
        ] {
            assert!(text.contains(words), "{words:?} is not in {text}");
        }
        // An agent that is there but does not answer is something else.
        found.holder = Some("4712".to_owned());
        let error = unattended(&found);
        assert_eq!(error.exit_code, crate::error::EXIT_FAILED);
        assert!(error.what.contains("(process 4712) does not answer"), "{error}");
    }

    #[test]
    fn shares_are_short() {
        assert_eq!(
            [0.0, 0.6667, 0.9994, 0.9996, 1.0].map(share),
            ["0.0%", "66.7%", "99.9%", "100%", "100%"]
        );
    }
}
