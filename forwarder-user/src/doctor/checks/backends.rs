//! Backends: who answers whom, and through which interface.

use ipnet::IpNet;

use super::networks::{captures, in_table};
use crate::{
    config::address::at_port,
    config::{Ports, Probe},
    diagnose::{
        self, Diagnosis,
        fix::{Fix, Host, device_of},
    },
    doctor::{
        checks::{attach, file, restart},
        facts::{Attempt, Backend, Facts},
        finding::{Cause, Finding, Severity},
    },
    health::ProbeFailure,
    network::MAIN_TABLE,
};

/// `networks` is what is known of overlapping networks: whatever they capture needs no other explanation.
pub(super) fn check(facts: &Facts, networks: &[Finding]) -> Vec<Finding> {
    let mut findings = Vec::new();
    for backend in &facts.backends {
        let found: Vec<_> = if captures(networks, backend.address) {
            Vec::new()
        } else if backend.attempts.iter().all(|attempt| attempt.outcome.is_ok()) {
            let mut findings = forwarded_elsewhere(facts, backend);
            findings.extend(wrong_egress(facts, backend));
            findings
        } else {
            silence(facts, backend)
        };
        findings.extend(found);
        findings.extend(narrow(facts, backend));
    }
    findings
}

/// Why a backend does not answer. If it answers no prefix of the pool, the first stands for all.
fn silence(facts: &Facts, backend: &Backend) -> Vec<Finding> {
    let gets_through = backend.attempts.iter().any(|attempt| attempt.outcome.is_ok());
    let failed = backend.attempts.iter().filter_map(|attempt| {
        let failure = attempt.outcome.as_ref().err()?;
        Some((attempt, failure))
    });
    failed
        .take(if gets_through { usize::MAX } else { 1 })
        .map(|(attempt, failure)| {
            let finding = match &attempt.diagnosis {
                Some(diagnosis) => explained(facts, backend, attempt, diagnosis),
                None => Finding::broken(
                    Cause::Path(diagnose::Cause::Unknown),
                    backend.address.to_string(),
                    format!(
                        "{}: {failure}; so many fail that only some were looked at closer",
                        backend.label()
                    ),
                ),
            };
            finding.affects([backend.label()])
        })
        .collect()
}

fn explained(facts: &Facts, backend: &Backend, attempt: &Attempt, diagnosis: &Diagnosis) -> Finding {
    use diagnose::Cause as Path;
    let tunnel = facts
        .network_of(backend.address)
        .and_then(|network| network.tunnel);
    let mut finding = match diagnosis.cause {
        Path::NoRoute | Path::Blackholed => return no_route(facts, backend, attempt, diagnosis),
        Path::Refused => refused(facts, backend),
        cause => {
            let server = || backend.address.to_string();
            let place = match cause {
                Path::TunnelDown => tunnel.map_or_else(server, str::to_owned),
                Path::InterfaceDown => backend.egress.clone().unwrap_or_else(server),
                Path::NoNeighbour | Path::NextHopSilent | Path::NoReturnRoute => {
                    backend.next_hop().map_or_else(server, |hop| hop.to_string())
                }
                _ => server(),
            };
            let finding =
                Finding::broken(Cause::Path(cause), place, &diagnosis.text).fixes(diagnosis.fixes.clone());
            // The fixes say it in commands already.
            match &diagnosis.hint {
                Some(hint) if !hint.contains('`') => finding.advice(hint),
                _ => finding,
            }
        }
    };
    let is_ours = matches!(
        diagnosis.cause,
        Path::TunnelDown | Path::InterfaceDown | Path::ProbeSourceNotLocal | Path::GatewayFault
    );
    if backend.probed_port.is_none() && !is_ours {
        // Nothing but an echo request was sent, which many servers ignore.
        finding.severity = Severity::Warning;
    }
    finding
}

/// Is it the route, or the table that was asked for it?
fn no_route(facts: &Facts, backend: &Backend, attempt: &Attempt, diagnosis: &Diagnosis) -> Finding {
    let network = facts.network_of(backend.address);
    let destination = network.map_or_else(|| IpNet::from(backend.address), |network| network.cidr);
    let decision = facts.policy.decide(attempt.source, backend.address);
    let decided = decision.as_ref().map(|decision| decision.rule);
    let configured = network.and_then(|network| Some((network.name, network.table?)));
    let other = decided.filter(|rule| rule.table.is_some_and(|table| table != MAIN_TABLE));
    let (table, why) = match (configured, other) {
        (Some((name, table)), _) => (
            table,
            format!("network \"{name}\" has routing table {table} of its own"),
        ),
        (None, Some(rule)) => {
            let table = rule.table.unwrap_or(MAIN_TABLE);
            let packets = format!("packets from {} to {}", attempt.source, backend.address);
            let rule = format!("rule {} (from {} to {})", rule.priority, rule.from, rule.to);
            (table, format!("{rule} sends {packets} to routing table {table}"))
        }
        (None, None) => (MAIN_TABLE, String::new()),
    };
    if table != MAIN_TABLE {
        let what = format!("{why}, which has no route to {destination}");
        let fixes = diagnosis.fixes.iter().map(|fix| {
            let is_route = fix.command.starts_with("ip route");
            let suffix = if is_route { in_table(table) } else { String::new() };
            Fix::new(fix.host, format!("{}{suffix}", fix.command))
        });
        return Finding::broken(Cause::TableWithoutRoute, format!("table {table}"), what).fixes(fixes);
    }
    let entry = decision.and_then(|decision| decision.entry);
    let is_written_for_it = entry.is_some_and(|entry| {
        !entry.discards && destination.contains(&entry.prefix) && entry.interface.is_some()
    });
    let cause = if is_written_for_it {
        Cause::WrongRoute
    } else {
        Cause::Path(diagnosis.cause)
    };
    let finding =
        Finding::broken(cause, destination.to_string(), &diagnosis.text).fixes(diagnosis.fixes.clone());
    match &diagnosis.hint {
        Some(hint) if diagnosis.fixes.is_empty() => finding.advice(hint),
        _ => finding,
    }
}

/// The server runs, but nothing listens there. Somewhere else, perhaps?
fn refused(facts: &Facts, backend: &Backend) -> Finding {
    let port = backend.probed_port.or(backend.port).unwrap_or(0);
    let server = Host::Server(backend.address);
    let place = at_port(backend.address, port);
    let is_http = facts.config.groups[&backend.group]
        .health
        .as_ref()
        .is_some_and(|check| matches!(check.probe, Probe::Http(_) | Probe::Https(..)));
    let Some(open) = likely_port(facts, backend) else {
        let what = format!(
            "server {} refuses connections to port {port}: nothing listens there",
            backend.address
        );
        let finding = Finding::broken(Cause::Path(diagnose::Cause::Refused), place, what);
        return if is_http {
            finding
                .fixes([Fix::new(server, "systemctl start nginx")])
                .advice(format!(
                    "nginx is a guess: start whatever serves port {port}; `ss -ltnp` there shows what listens"
                ))
        } else {
            finding.advice(format!(
                "on the server, start what serves port {port}; `ss -ltnp` there shows what listens, also if only on 127.0.0.1"
            ))
        };
    };
    let table = if backend.port == Some(port) {
        format!("group.{}.backend.{}", backend.group, backend.name)
    } else {
        format!("group.{}.health", backend.group)
    };
    let edit = format!(
        r"sed -i '/^\[{}\]/,/^\[/ s/^port *=.*/port = {open}/' {}",
        table.replace('.', r"\."),
        file(facts)
    );
    let what = format!(
        "server {} refuses connections to port {port}, but listens on {open}: the configuration names the wrong port",
        backend.address
    );
    Finding::broken(Cause::WrongPort, place, what)
        .fixes([Fix::here(edit)])
        .fixes(restart(facts))
        .advice(format!("if {port} is right, start on the server what serves it"))
}

/// The open port that was most likely meant: one that clients know the group by.
fn likely_port(facts: &Facts, backend: &Backend) -> Option<u16> {
    let is_of_listener = |port: &&u16| {
        let mut listeners = facts.config.listeners.values();
        listeners
            .any(|listener| listener.group == backend.group && listener.ports.overlaps(Ports::one(**port)))
    };
    let mut ports = backend.open_ports.iter();
    ports.find(is_of_listener).or(backend.open_ports.first()).copied()
}

/// The backend answers this host, but what comes in by an interface takes another way.
fn forwarded_elsewhere(facts: &Facts, backend: &Backend) -> Vec<Finding> {
    let Ok(route) = &backend.route else {
        return Vec::new();
    };
    let egress = backend.egress.as_deref().unwrap_or("-");
    let network = facts.network_of(backend.address);
    let destination = network.map_or_else(|| IpNet::from(backend.address), |network| network.cidr);
    let lost = backend.astray.iter().filter(|(_, leaves_by)| {
        // Several ways may be meant, as long as replies pass the data path.
        leaves_by.as_ref().is_none_or(|name| !facts.is_attached(name))
    });
    lost.map(|(name, leaves_by)| {
        let instead = leaves_by
            .as_ref()
            .map_or_else(|| "find no route".to_owned(), |name| format!("leave by {name}"));
        let what = format!(
            "packets to {destination} that come in by {name} {instead}, those of this host leave by {egress}: a VRF or \
             a routing rule sends them elsewhere"
        );
        let vrf_table = facts
            .device(name)
            .and_then(|device| facts.device_by_index(device.link.controller?)?.vrf_table);
        let via = route.gateway.map_or_else(String::new, |router| format!(" via {router}"));
        let conditional = facts.policy.rules.iter().filter(|rule| rule.is_conditional);
        let before = conditional.map(|rule| rule.priority).min().unwrap_or(MAIN_TABLE);
        let command = match vrf_table {
            Some(table) => format!("ip route replace {destination}{via} dev {egress} table {table}"),
            None => format!(
                "ip rule add priority {} iif {name} to {destination} lookup main",
                before.saturating_sub(1)
            ),
        };
        Finding::broken(Cause::ForwardedElsewhere, name, what)
            .affects([backend.label()])
            .fixes([Fix::here(command)])
            .advice("`ip rule` shows the rule that decides; better than to overrule it is to correct it")
    })
    .collect()
}

/// A backend that answers probes through an interface where nobody translates its replies to clients.
fn wrong_egress(facts: &Facts, backend: &Backend) -> Option<Finding> {
    let route = backend.route.as_ref().ok()?;
    let egress = backend.egress.as_ref()?;
    (!route.is_local && !facts.is_attached(egress)).then(|| {
        let what = format!(
            "replies of {} come in by {egress}, which is no [interface] or [tunnel] of the configuration: nobody \
             translates them back",
            backend.label()
        );
        Finding::broken(Cause::EgressNotAttached, egress, what)
            .affects([backend.label()])
            .fixes(attach(facts, egress))
            .advice(format!("if {egress} is a tunnel device, name it under [tunnel] instead of [interface]"))
    })
}

/// Small packets arrive, large ones do not.
fn narrow(facts: &Facts, backend: &Backend) -> Option<Finding> {
    let narrow = backend.narrow?;
    let egress = backend.egress.as_ref()?;
    let route = backend.route.as_ref().ok()?;
    let (host, far) = match route.gateway {
        Some(router) => (Host::Router(router), router),
        None => (Host::Server(backend.address), backend.address),
    };
    let carried_bytes = narrow.carried_bytes;
    let what = format!(
        "packets of {} bytes, which {egress} takes, get lost on the way to {} or back; those of {carried_bytes} bytes \
         arrive",
        narrow.mtu_bytes,
        backend.label()
    );
    let same_way = facts.backends.iter().filter(|other| other.route == backend.route);
    Some(
        Finding::broken(Cause::MtuTooSmall, egress, what)
            .affects(same_way.map(Backend::label))
            .fixes([
                Fix::here(format!("ip link set dev {egress} mtu {carried_bytes}")),
                Fix::new(
                    host,
                    format!("ip link set dev {} mtu {carried_bytes}", device_of(far)),
                ),
            ])
            .fixes(restart(facts))
            .advice("or raise the MTU of the link that is too narrow"),
    )
}

/// What to print of a backend that was asked: `answers` or the failure.
#[must_use]
pub(in crate::doctor) fn answer(backend: &Backend) -> String {
    let failed: Vec<_> = backend
        .attempts
        .iter()
        .filter(|attempt| attempt.outcome.is_err())
        .collect();
    let failure = |attempt: &Attempt| match &attempt.outcome {
        Err(ProbeFailure::TimedOut { .. }) => "silent".to_owned(),
        Err(failure) => failure.name().to_owned(),
        Ok(_) => "answers".to_owned(),
    };
    match failed[..] {
        [] => "answers".to_owned(),
        [one, ..] if failed.len() == backend.attempts.len() => failure(one),
        [one, ..] => format!("{} to {}", failure(one), one.prefix),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        doctor::{
            checks::testing::{device, sound},
            facts::Narrow,
        },
        network::{Entry, InterfaceKind, Rule},
    };

    fn only(facts: &Facts) -> Finding {
        let findings = check(facts, &[]);
        assert_eq!(findings.len(), 1, "{findings:?}");
        findings[0].clone()
    }

    /// The remote backend fails, and that is why.
    fn failing(cause: diagnose::Cause, fixes: &[Fix]) -> Facts {
        let mut facts = sound();
        let attempt = &mut facts.backends[1].attempts[0];
        attempt.outcome = Err(ProbeFailure::Refused);
        attempt.diagnosis = Some(Diagnosis {
            cause,
            text: "it is so".to_owned(),
            hint: Some("do that".to_owned()),
            fixes: fixes.to_vec(),
        });
        facts
    }

    #[test]
    fn backends_that_answer_have_nothing() {
        assert_eq!(check(&sound(), &[]), []);
        assert_eq!(answer(&sound().backends[0]), "answers");
    }

    #[test]
    fn a_route_is_missing_wrong_or_in_another_table() {
        let fix = Fix::here("ip route replace 192.168.0.0/16 via 169.254.42.2 dev cen");
        let mut facts = failing(diagnose::Cause::NoRoute, std::slice::from_ref(&fix));
        // Its own route leads elsewhere.
        assert_eq!(only(&facts).cause, Cause::WrongRoute);
        assert_eq!(only(&facts).fixes, std::slice::from_ref(&fix));
        // There is none, or just a default route.
        facts.policy.entries.retain(|entry| entry.interface != Some(3));
        assert_eq!(only(&facts).cause, Cause::Path(diagnose::Cause::NoRoute));
        assert_eq!(only(&facts).place, "192.168.0.0/16");
        // A rule asks another table, which discards.
        facts.policy.rules.insert(
            0,
            Rule {
                priority: 100,
                from: "0.0.0.0/0".parse().unwrap(),
                to: "192.168.0.0/16".parse().unwrap(),
                table: Some(42),
                is_conditional: false,
            },
        );
        facts.policy.entries.push(Entry {
            table: 42,
            prefix: IpNet::default(),
            interface: None,
            is_of_address: false,
            discards: true,
        });
        let finding = only(&facts);
        assert_eq!(
            (finding.cause, finding.place.as_str()),
            (Cause::TableWithoutRoute, "table 42")
        );
        assert_eq!(finding.fixes, [Fix::here(format!("{} table 42", fix.command))]);
        // The network has one of its own.
        facts.tables.insert("vpc2".to_owned(), 7);
        assert_eq!(
            only(&facts).fixes,
            [Fix::here(format!("{} table 7", fix.command))]
        );
    }

    #[test]
    fn an_overlap_explains_what_it_captures() {
        let facts = failing(diagnose::Cause::NoRoute, &[]);
        let overlap = Finding::broken(Cause::OverlappingNetwork, "192.168.1.0/24", "");
        assert_eq!(check(&facts, &[overlap]), []);
    }

    #[test]
    fn refused_may_be_the_wrong_port() {
        let mut facts = failing(diagnose::Cause::Refused, &[]);
        let finding = only(&facts);
        assert_eq!(finding.place, "192.168.1.10:80");
        assert_eq!(finding.fixes[0].command, "systemctl start nginx");
        facts.backends[1].port = Some(8081);
        facts.backends[1].probed_port = Some(8081);
        facts.backends[1].open_ports = vec![22, 80];
        let finding = only(&facts);
        assert_eq!(finding.cause, Cause::WrongPort);
        assert_eq!(
            finding.fixes,
            [Fix::here(
                r"sed -i '/^\[group\.web\.backend\.ecs02\]/,/^\[/ s/^port *=.*/port = 80/' /etc/forwarder.toml"
            )]
        );
    }

    #[test]
    fn one_prefix_of_the_pool_may_fail_alone() {
        let mut facts = failing(diagnose::Cause::NoReturnRoute, &[]);
        let mut sound = facts.backends[0].attempts[0].clone();
        sound.prefix = "100.64.9.0/26".parse().unwrap();
        facts.backends[1].attempts.push(sound);
        assert_eq!(only(&facts).place, "169.254.42.2");
        assert_eq!(answer(&facts.backends[1]), "refused to 100.64.0.0/26");
    }

    #[test]
    fn an_echo_request_alone_convicts_nobody() {
        let mut facts = failing(diagnose::Cause::ServerDownOrFiltered, &[]);
        assert_eq!(only(&facts).severity, Severity::Broken);
        facts.backends[1].probed_port = None;
        assert_eq!(only(&facts).severity, Severity::Warning);
    }

    #[test]
    fn replies_need_an_attached_interface() {
        let mut facts = sound();
        facts.config.tunnels.clear();
        let finding = only(&facts);
        assert_eq!(
            (finding.cause, finding.place.as_str()),
            (Cause::EgressNotAttached, "cen")
        );
        assert_eq!(finding.affects, ["web/ecs02"]);
    }

    #[test]
    fn what_is_forwarded_may_go_elsewhere() {
        let mut facts = sound();
        facts.backends[1].astray = vec![("eth0".to_owned(), Some("eth1".to_owned()))];
        assert_eq!(check(&facts, &[]), []);
        facts.backends[1].astray = vec![("eth0".to_owned(), None)];
        facts.policy.rules[0].is_conditional = true;
        let rule = "ip rule add priority 32765 iif eth0 to 192.168.0.0/16 lookup main";
        assert_eq!(only(&facts).fixes, [Fix::here(rule)]);
        // In a VRF the route belongs into its table.
        let mut vrf = device("blue", 9, InterfaceKind::Other("vrf".to_owned()), &[]);
        vrf.vrf_table = Some(10);
        facts.devices.push(vrf);
        facts.devices[0].link.controller = Some(9);
        let route = "ip route replace 192.168.0.0/16 via 169.254.42.2 dev cen table 10";
        assert_eq!(only(&facts).fixes, [Fix::here(route)]);
    }

    #[test]
    fn a_narrow_path_gets_its_size_at_both_ends() {
        let mut facts = sound();
        facts.backends[1].narrow = Some(Narrow {
            mtu_bytes: 1450,
            carried_bytes: 1350,
        });
        let finding = only(&facts);
        assert_eq!(
            (finding.cause, finding.place.as_str()),
            (Cause::MtuTooSmall, "cen")
        );
        assert_eq!(finding.fixes[0], Fix::here("ip link set dev cen mtu 1350"));
        assert_eq!(finding.fixes[1].host, Host::Router([169, 254, 42, 2].into()));
    }
}
