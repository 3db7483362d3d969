//! What the forwarder is meant to reach, and whether it does: computed from the figures of the last run of each benchmark.
//!
//! A reason is written by hand, and shown only where the target is not met.

use std::fmt::Write as _;

use super::{memory, nat, packets, page::Results, tunnels};

/// What a ratio has to be.
#[derive(Clone, Copy, Debug)]
enum Limit {
    AtMost(f64),
    AtLeast(f64),
}

impl Limit {
    fn holds(self, value: f64) -> bool {
        match self {
            Self::AtMost(most) => value <= most,
            Self::AtLeast(least) => value >= least,
        }
    }
}

/// A ratio of two figures of one benchmark.
struct Part {
    label: &'static str,
    benchmark: &'static str,
    over: &'static str,
    under: &'static str,
}

const fn part(label: &'static str, benchmark: &'static str, over: &'static str, under: &'static str) -> Part {
    Part {
        label,
        benchmark,
        over,
        under,
    }
}

struct Target {
    what: &'static str,
    limit: Limit,
    parts: &'static [Part],
    reason: &'static str,
}

const P: &str = packets::NAME;
const N: &str = nat::NAME;

const TARGETS: [Target; 13] = [
    Target {
        what: "established, full NAT, 1 flow: at most 1.3 × the minimal program",
        limit: Limit::AtMost(1.3),
        parts: &[
            part("request", P, "request, full NAT @ 1", "minimal program @ 1"),
            part("reply", P, "reply, full NAT @ 1", "minimal program @ 1"),
        ],
        reason: "three cache lines of the flow's entry, its TCP state and next hop, and counters by reason, listener and \
                 backend are what the minimal program has not",
    },
    Target {
        what: "the same at 65 536 flows",
        limit: Limit::AtMost(1.3),
        parts: &[
            part(
                "request",
                P,
                "request, full NAT @ 65536",
                "minimal program @ 65536",
            ),
            part("reply", P, "reply, full NAT @ 65536", "minimal program @ 65536"),
        ],
        reason: "as above",
    },
    Target {
        what: "packets that are not ours: at most 0.5 × the minimal program",
        limit: Limit::AtMost(0.5),
        parts: &[part("", P, "not for us @ 1", "minimal program @ 1")],
        reason: "a lookup that finds nothing costs as much as one that does, and the minimal program has two",
    },
    Target {
        what: "the same beside a group in DNAT",
        limit: Limit::AtMost(0.5),
        parts: &[part(
            "",
            P,
            "not for us, beside a group in DNAT @ 1",
            "minimal program @ 1",
        )],
        reason: "as above",
    },
    Target {
        what: "new flow: at most 1.5 × its inserts",
        limit: Limit::AtMost(1.5),
        parts: &[
            part(
                "full NAT",
                P,
                "new flow, full NAT @ 1048576",
                "inserts of a flow with one key @ 1048576",
            ),
            part(
                "DNAT",
                P,
                "new flow, DNAT @ 1048576",
                "inserts of a flow with two keys @ 1048576",
            ),
        ],
        reason: "the entry itself, which misses the cache, the choice of the backend, limits, counters, the way back to the client",
    },
    Target {
        what: "the same, of the inserts of its keys and its entry",
        limit: Limit::AtMost(1.5),
        parts: &[
            part(
                "full NAT",
                P,
                "new flow, full NAT @ 1048576",
                "inserts of a flow with one key and its entry @ 1048576",
            ),
            part(
                "full NAT, which asks for its way",
                P,
                "new flow, full NAT, which asks for its way @ 1048576",
                "inserts of a flow with one key and its entry @ 1048576",
            ),
            part(
                "full NAT, IPv6",
                P,
                "new flow, full NAT, IPv6 @ 1048576",
                "inserts of a flow with one key and its entry @ 1048576",
            ),
            part(
                "DNAT",
                P,
                "new flow, DNAT @ 1048576",
                "inserts of a flow with two keys and its entry @ 1048576",
            ),
        ],
        reason: "as above, without the entry; those two ask for a route each",
    },
    Target {
        what: "flat within 10 % from 1 to 10 000 listeners",
        limit: Limit::AtMost(1.1),
        parts: &[part(
            "",
            P,
            "request, full NAT, listeners: 10000 @ 65536",
            "request, full NAT, listeners: 1 @ 65536",
        )],
        reason: "each listener has counters of its own, which miss the cache when there are many",
    },
    Target {
        what: "flat within 10 % from 8 to 10 000 backends",
        limit: Limit::AtMost(1.1),
        parts: &[part(
            "",
            P,
            "request, full NAT, backends: 10000 @ 65536",
            "request, full NAT, backends: 8 @ 65536",
        )],
        reason: "each backend has counters of its own, which miss the cache when there are many",
    },
    Target {
        what: "at least 5 × the packets per CPU second of nftables' NAT",
        limit: Limit::AtLeast(5.0),
        parts: &[
            part(
                "request",
                N,
                "requests, 1 flow, nftables",
                "requests, 1 flow, forwarder",
            ),
            part(
                "reply",
                N,
                "replies, 1 flow, nftables",
                "replies, 1 flow, forwarder",
            ),
            part(
                "request, 4096 flows",
                N,
                "requests, 4096 flows, nftables",
                "requests, 4096 flows, forwarder",
            ),
            part(
                "request into VXLAN",
                tunnels::NAME,
                "requests, nftables and the kernel's device",
                "requests, native",
            ),
            part(
                "reply out of VXLAN",
                tunnels::NAME,
                "replies, nftables and the kernel's device",
                "replies, native",
            ),
        ],
        reason: "what is left has one more veth link in it, which a network card would not have",
    },
    Target {
        what: "the same of requests over TCP",
        limit: Limit::AtLeast(5.0),
        parts: &[
            part(
                "kept connections",
                N,
                "keep-alive, 32 connections, nftables",
                "keep-alive, 32 connections, forwarder",
            ),
            part(
                "new connections",
                N,
                "a connection per request, 32 at a time, nftables",
                "a connection per request, 32 at a time, forwarder",
            ),
            part(
                "large transfers",
                N,
                "4 MiB each, 4 connections, nftables",
                "4 MiB each, 4 connections, forwarder",
            ),
        ],
        reason: "most of what is left is one more veth link, as below; of a large transfer nftables handles segments of up to \
                 64 kB (GRO), the forwarder every frame",
    },
    Target {
        what: "at least 10 × the packets per CPU second of HAProxy",
        limit: Limit::AtLeast(10.0),
        parts: &[
            part(
                "kept connections",
                N,
                "keep-alive, 32 connections, HAProxy",
                "keep-alive, 32 connections, forwarder",
            ),
            part(
                "new connections",
                N,
                "a connection per request, 32 at a time, HAProxy",
                "a connection per request, 32 at a time, forwarder",
            ),
            part(
                "large transfers",
                N,
                "4 MiB each, 4 connections, HAProxy",
                "4 MiB each, 4 connections, forwarder",
            ),
        ],
        reason: "most of what is left is one more veth link, see the next two lines; of a large transfer HAProxy handles segments \
                 of up to 64 kB (GRO, splice), the forwarder every frame",
    },
    Target {
        what: "the same, of what is done beyond a wire with as many links",
        limit: Limit::AtLeast(10.0),
        parts: &[
            part(
                "kept connections",
                N,
                "keep-alive, 32 connections, HAProxy, less a wire",
                "keep-alive, 32 connections, forwarder, less a wire",
            ),
            part(
                "new connections",
                N,
                "a connection per request, 32 at a time, HAProxy, less a wire",
                "a connection per request, 32 at a time, forwarder, less a wire",
            ),
            part(
                "large transfers",
                N,
                "4 MiB each, 4 connections, HAProxy, less a wire",
                "4 MiB each, 4 connections, forwarder, less a wire",
            ),
        ],
        reason: "of a large transfer HAProxy handles segments of up to 64 kB, the forwarder every frame",
    },
    Target {
        what: "the same of the wire itself, which hands over what comes",
        limit: Limit::AtLeast(10.0),
        parts: &[
            part(
                "kept connections",
                N,
                "keep-alive, 32 connections, HAProxy",
                "keep-alive, 32 connections, a wire",
            ),
            part(
                "new connections",
                N,
                "a connection per request, 32 at a time, HAProxy",
                "a connection per request, 32 at a time, a wire",
            ),
            part(
                "large transfers",
                N,
                "4 MiB each, 4 connections, HAProxy",
                "4 MiB each, 4 connections, a wire",
            ),
        ],
        reason: "so by none that hands over frame by frame",
    },
];

/// What a target came to.
#[derive(Debug, PartialEq, Eq)]
enum Outcome {
    Met,
    NotMet,
    /// A benchmark that it needs has not run.
    Unknown,
}

impl Target {
    fn judge(&self, results: &Results) -> (Outcome, String) {
        let mut outcome = Outcome::Met;
        let mut text = String::new();
        for part in self.parts {
            if !text.is_empty() {
                text.push_str(", ");
            }
            let figure = |name| results.figure(part.benchmark, name);
            if !part.label.is_empty() {
                // Writing to a String cannot fail.
                let _ = write!(text, "{} ", part.label);
            }
            match (figure(part.over), figure(part.under)) {
                (Some(over), Some(under)) if under > 0.0 => {
                    let ratio = over / under;
                    let _ = write!(text, "{ratio:.2}");
                    if !self.limit.holds(ratio) && outcome == Outcome::Met {
                        outcome = Outcome::NotMet;
                    }
                }
                _ => {
                    text.push('?');
                    outcome = Outcome::Unknown;
                }
            }
        }
        (outcome, text)
    }
}

/// The table of targets in Markdown.
pub fn markdown(results: &Results) -> String {
    let mut lines = vec!["| target | measured | |".to_owned(), "|---|---|---|".to_owned()];
    for target in &TARGETS {
        let (outcome, measured) = target.judge(results);
        let verdict = match outcome {
            Outcome::Met => "met".to_owned(),
            Outcome::NotMet => format!("not met: {}", target.reason),
            Outcome::Unknown => "not measured".to_owned(),
        };
        lines.push(format!("| {} | {measured} | {verdict} |", target.what));
    }
    if let Some(bytes) = results.figure(memory::NAME, "bytes per flow") {
        lines.push(format!(
            "| memory per flow: told, no bound | {bytes:.0} bytes in the kernel | |"
        ));
    }
    lines.join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn results(request: f64, reply: f64) -> Results {
        let mut results = Results::default();
        for (name, value) in [
            ("request, full NAT @ 1", request),
            ("reply, full NAT @ 1", reply),
            ("minimal program @ 1", 100.0),
        ] {
            results.note(P, name, value);
        }
        results
    }

    #[test]
    fn a_target_is_met_only_by_all_its_parts() {
        let judge = |request, reply| TARGETS[0].judge(&results(request, reply));
        assert_eq!(
            judge(130.0, 90.0),
            (Outcome::Met, "request 1.30, reply 0.90".to_owned())
        );
        assert_eq!(judge(131.0, 90.0).0, Outcome::NotMet);
        assert_eq!(judge(90.0, 131.0).0, Outcome::NotMet);
    }

    #[test]
    fn a_target_without_figures_is_not_met() {
        assert_eq!(TARGETS[1].judge(&results(1.0, 1.0)).0, Outcome::Unknown);
        let page = markdown(&results(200.0, 1.0));
        assert!(
            page.contains("not met: ") && page.contains("not measured"),
            "{page}"
        );
    }

    #[test]
    fn at_least_is_a_lower_bound() {
        assert!(Limit::AtLeast(5.0).holds(5.0));
        assert!(!Limit::AtLeast(5.0).holds(4.99));
        assert!(!Limit::AtMost(1.3).holds(1.31));
    }
}
