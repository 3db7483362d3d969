//! `forwarder explain`: what would happen to a packet, or to those of a capture.
//!
//! The packet is built here, or read from a file; the agent runs the data path's own library on it over a view of
//! the live tables.

use super::{
    args::{ExplainArgs, OutputFormat, TransportName},
    ask, output,
    status::duration,
    table::{Align, lines},
};
use crate::{
    api::EXPLAIN_PATH,
    error::{Error, Errors},
    explain::{
        BackendChoice, Bytes, Choice, ExplainRequest, Explanation, Explanations, capture, frame::Wanted,
    },
    flows::FlowStatus,
};

/// Asks the agent and prints its answer.
///
/// # Errors
/// No agent answers, the capture can't be read, the interface has no program, or the answer can't be written.
pub fn explain(args: &ExplainArgs) -> Result<(), Errors> {
    let frames = match &args.pcap {
        Some(file) => capture::read(file)?,
        None => vec![wanted(args)?.frame()],
    };
    let request = ExplainRequest {
        interface: args.interface.clone(),
        packets: frames.into_iter().map(Bytes).collect(),
    };
    let answer: Explanations = ask::post(&args.agent.socket, EXPLAIN_PATH, &request)?;
    match (args.output.output, &args.pcap, answer.packets.first()) {
        (OutputFormat::Json, None, Some(packet)) => output::json(packet)?,
        (OutputFormat::Json, ..) => output::json(&answer)?,
        (OutputFormat::Text, None, Some(packet)) => output::text(&draw(packet))?,
        (OutputFormat::Text, ..) => output::text(&draw_capture(&answer.packets))?,
    }
    Ok(())
}

fn wanted(args: &ExplainArgs) -> Result<Wanted, Error> {
    match (args.protocol, args.source, args.destination) {
        (_, Some(source), Some(destination)) if source.is_ipv4() != destination.is_ipv4() => Err(
            Error::usage(format!("{source} and {destination} are of different families"))
                .hint("a packet has two addresses of IPv4, or two of IPv6"),
        ),
        (Some(protocol), Some(source), Some(destination))
            if protocol != TransportName::Icmp && (source.port() == 0 || destination.port() == 0) =>
        {
            Err(Error::usage("the packet has no ports").hint("give PROTOCOL SOURCE:PORT DESTINATION:PORT"))
        }
        (Some(protocol), Some(source), Some(destination)) => Ok(Wanted {
            protocol: protocol.protocol(),
            source,
            destination,
            flags: args.flags.clone(),
            ttl: args.ttl,
            length_bytes: args.length,
        }),
        _ => {
            Err(Error::usage("the packet is not complete").hint("give PROTOCOL SOURCE:PORT DESTINATION:PORT"))
        }
    }
}

const NOTHING_CHANGED: &str = "Nothing was changed.";

/// One packet, step by step.
fn draw(packet: &Explanation) -> String {
    let mut text = vec![arrival(packet)];
    if let Some(choice) = &packet.choice {
        text.extend(choice_lines(choice));
    }
    if let Some(flow) = &packet.flow {
        text.push(flow_line(flow, packet.direction.as_deref().unwrap_or_default()));
    }
    text.push(format!("would {}", outcome(packet)));
    text.push(format!("{}: {}: {}", packet.verdict, packet.reason, packet.text));
    if !packet.hint.is_empty() {
        text.push(format!("hint: {}", packet.hint));
    }
    text.push(NOTHING_CHANGED.to_owned());
    text.join("\n")
}

fn arrival(packet: &Explanation) -> String {
    let summary = &packet.packet;
    let mut text = summary.to_string();
    if let (Some(length), Some(ttl)) = (summary.length_bytes, summary.ttl) {
        text.push_str(&format!(", {length} bytes, TTL {ttl}"));
    }
    format!("{text}, arriving on {} ({})", packet.interface, packet.attachment)
}

fn choice_lines(choice: &Choice) -> Vec<String> {
    let mut path = vec![format!("listener {}", choice.listener)];
    path.extend(choice.group.as_ref().map(|group| format!("group {group}")));
    match (choice.decided_by.as_deref(), choice.slot, choice.slots) {
        (Some("persistence"), ..) => path.push("where its client's last flow went".to_owned()),
        (Some("overflow"), Some(slot), Some(slots)) => path.push(format!("overflow slot {slot} of {slots}")),
        (_, Some(slot), Some(slots)) => path.push(format!("slot {slot} of {slots}")),
        _ => {}
    }
    path.extend(
        choice
            .backend
            .as_ref()
            .map(|backend| format!("backend {}", backend_text(backend))),
    );
    let mut text = vec![path.join(" -> ")];
    if !choice.passed_over.is_empty() {
        let names: Vec<_> = choice.passed_over.iter().map(backend_text).collect();
        text.push(format!("passed over: {}", names.join(", ")));
    }
    text
}

fn backend_text(backend: &BackendChoice) -> String {
    let weight = backend
        .weight
        .map_or_else(String::new, |weight| format!(", weight {weight}"));
    format!("{} {} ({}{weight})", backend.name, backend.address, backend.state)
}

fn flow_line(flow: &FlowStatus, direction: &str) -> String {
    let age = flow.age_secs.map_or_else(
        || "new".to_owned(),
        |age| format!("open for {}", duration(age.into())),
    );
    format!(
        "{direction} of a flow of listener {} -> group {} -> backend {} {}: {}, {age}, idle for {}, bound to {}",
        flow.listener,
        flow.group,
        flow.backend,
        flow.backend_address,
        flow.state,
        duration(flow.idle_secs.into()),
        flow.binding
    )
}

/// What comes after "would".
fn outcome(packet: &Explanation) -> String {
    let belongs_to_flow = packet.flow.is_some() || packet.binding.is_some();
    if packet.action == "transmit" && !belongs_to_flow {
        return format!("answer it with {}", packet.packet_after);
    }
    let mut parts = Vec::new();
    if let Some(binding) = packet.binding {
        parts.push(if packet.is_binding_certain {
            format!("bind {binding}")
        } else {
            format!("bind a free address and port such as {binding}")
        });
    }
    let is_rewritten = packet.bytes_before != packet.bytes_after;
    let (before, after) = (&packet.packet, &packet.packet_after);
    if is_rewritten && (&before.source, &before.destination) != (&after.source, &after.destination) {
        parts.push(format!("rewrite it to {after}"));
    }
    let egress = packet.egress.as_deref().unwrap_or_default();
    let towards = packet.route.as_ref().and_then(|route| route.interface.as_deref());
    parts.push(match (packet.action.as_str(), towards) {
        ("transmit", _) => format!("send it back out of {egress}"),
        ("redirect", _) => format!("redirect it to {egress}"),
        ("pass", Some(towards)) => format!("hand it to the stack, which routes it to {towards}"),
        ("pass", None) if is_rewritten => "hand it to the stack, which routes it".to_owned(),
        ("pass", None) => "leave it to the stack as it is".to_owned(),
        _ => "drop it".to_owned(),
    });
    parts.join(", ")
}

/// A capture: a line per packet.
fn draw_capture(packets: &[Explanation]) -> String {
    let columns = [
        ("", Align::Right),
        ("PACKET", Align::Left),
        ("ON", Align::Left),
        ("VERDICT", Align::Left),
        ("REASON", Align::Left),
        ("WOULD", Align::Left),
    ];
    let rows = packets.iter().enumerate().map(|(index, packet)| {
        [
            (index + 1).to_string(),
            packet.packet.to_string(),
            packet.interface.clone(),
            packet.verdict.clone(),
            packet.reason.clone(),
            outcome(packet),
        ]
    });
    let mut text = lines(columns, rows.collect());
    text.push(NOTHING_CHANGED.to_owned());
    text.join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        explain::{RouteText, frame::PacketSummary},
        flows::FlowPhase,
    };

    fn summary(source: &str, destination: &str) -> PacketSummary {
        PacketSummary {
            protocol: "tcp".to_owned(),
            source: Some(source.to_owned()),
            destination: Some(destination.to_owned()),
            flags: Some("SYN".to_owned()),
            ttl: Some(64),
            length_bytes: Some(40),
        }
    }

    fn new_flow() -> Explanation {
        Explanation {
            interface: "eth0".to_owned(),
            attachment: "xdp-native".to_owned(),
            packet: summary("192.0.2.7:51000", "198.51.100.10:443"),
            choice: Some(Choice {
                listener: "web".to_owned(),
                group: Some("web-eu".to_owned()),
                slot: Some(1931),
                slots: Some(65_537),
                selection: Some("maglev".to_owned()),
                decided_by: Some("slot".to_owned()),
                backend: Some(BackendChoice {
                    name: "ecs01".to_owned(),
                    address: "10.20.0.5:8443".parse().unwrap(),
                    state: "healthy".to_owned(),
                    weight: Some(10),
                }),
                passed_over: Vec::new(),
            }),
            flow: None,
            direction: Some("request".to_owned()),
            binding: Some("100.64.0.4:20113".parse().unwrap()),
            is_binding_certain: true,
            route: Some(RouteText {
                kind: "neighbour".to_owned(),
                interface: Some("eth1".to_owned()),
            }),
            verdict: "send".to_owned(),
            action: "redirect".to_owned(),
            egress: Some("eth1".to_owned()),
            reason: "request_forwarded".to_owned(),
            text: "A request was rewritten and sent towards its backend.".to_owned(),
            hint: String::new(),
            packet_after: summary("100.64.0.4:20113", "10.20.0.5:8443"),
            bytes_before: Bytes(vec![1]),
            bytes_after: Bytes(vec![2]),
        }
    }

    #[test]
    fn a_new_flow_is_told_step_by_step() {
        assert_eq!(
            draw(&new_flow()),
            "tcp 192.0.2.7:51000 > 198.51.100.10:443 SYN, 40 bytes, TTL 64, arriving on eth0 (xdp-native)\n\
             listener web -> group web-eu -> slot 1931 of 65537 -> backend ecs01 10.20.0.5:8443 (healthy, weight 10)\n\
             would bind 100.64.0.4:20113, rewrite it to tcp 100.64.0.4:20113 > 10.20.0.5:8443 SYN, redirect it to eth1\n\
             send: request_forwarded: A request was rewritten and sent towards its backend.\n\
             Nothing was changed."
        );
    }

    #[test]
    fn a_packet_of_a_flow_shows_the_flow() {
        let mut packet = new_flow();
        packet.choice = None;
        packet.binding = None;
        packet.flow = Some(FlowStatus {
            protocol: "tcp".to_owned(),
            client: "192.0.2.7:51000".parse().unwrap(),
            vip: "198.51.100.10:443".parse().unwrap(),
            listener: "web".to_owned(),
            group: "web-eu".to_owned(),
            backend: "ecs01".to_owned(),
            backend_address: "10.20.0.5:8443".parse().unwrap(),
            binding: "100.64.0.4:20113".parse().unwrap(),
            state: FlowPhase::Established,
            age_secs: Some(75),
            idle_secs: 3,
            packets_in: 3,
            bytes_in: 180,
            packets_out: 2,
            bytes_out: 120,
        });
        let text = draw(&packet);
        assert_eq!(
            text.lines().nth(1),
            Some(
                "request of a flow of listener web -> group web-eu -> backend ecs01 10.20.0.5:8443: established, \
                 open for 1 min 15 s, idle for 3 s, bound to 100.64.0.4:20113"
            )
        );
    }

    #[test]
    fn a_packet_that_is_left_alone_is_said_so_with_its_hint() {
        let mut packet = new_flow();
        (packet.choice, packet.binding, packet.route, packet.egress) = (None, None, None, None);
        packet.packet_after = packet.packet.clone();
        packet.bytes_after = packet.bytes_before.clone();
        (packet.verdict, packet.action) = ("pass".to_owned(), "pass".to_owned());
        packet.reason = "no_listener".to_owned();
        packet.text = "The destination is a VIP, but no listener has this port and protocol.".to_owned();
        packet.hint = "Add a listener.".to_owned();
        let text = draw(&packet);
        assert!(
            text.contains("\nwould leave it to the stack as it is\npass: no_listener: The"),
            "{text}"
        );
        assert!(text.contains("\nhint: Add a listener.\n"), "{text}");
    }

    #[test]
    fn a_binding_that_is_a_guess_is_said_to_be_one() {
        let mut packet = new_flow();
        packet.is_binding_certain = false;
        let text = draw_capture(&[new_flow(), packet]);
        let lines: Vec<_> = text.lines().collect();
        assert_eq!(lines.len(), 4);
        assert!(
            lines[2].contains("bind a free address and port such as 100.64.0.4:20113"),
            "{text}"
        );
    }
}
