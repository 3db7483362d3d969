//! From what the operator wrote to a [`Config`]: defaults, and every rule that needs more than one place of
//! the file.
//!
//! Each rule reports what it finds and the next one goes on, so one run shows everything. A value that
//! could not be read is skipped, as it was reported where it was read. No I/O: whether an interface exists
//! or a backend answers is the agent's to find out.

use std::{
    collections::{BTreeMap, BTreeSet, btree_map},
    fmt::Display,
    net::{IpAddr, Ipv4Addr, SocketAddr},
    path::PathBuf,
    time::Duration,
};

use forwarder_common::abi::snat::{MAX_RANGES, PORTS_PER_ADDRESS};
use ipnet::IpNet;

use super::{
    Agent, Backend, Config, Group, HealthCheck, Interface, Listener, MadeKind, MadeTunnel, NatMode, Network,
    OnStop, OnUnhealthy, Passive, PerFamily, Persistence, Ports, Protocol, Redirect, RemoteApi, RemoteTls,
    RoutingTable, Selection, SnatPool, SourceRate, SynCookies, TableSizes, Tunnel, TunnelMode, XdpMode,
    address::{DEFAULT_BACKEND_RANGES, count, family_name, hosts, not_for_hosts, plus, without_mapped},
    health::{
        read::HealthKind,
        rules::{group_check, tunnel_check},
    },
    reader::{At, Entry, Field, Named, OptionalField, Report, Reported, did_you_mean},
    schema::{self, Document},
};
use crate::error::Error;

/// Most backends of one group.
pub const MAX_BACKENDS: usize = 10_000;

const DEFAULT_METRICS_ADDRESS: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 9469);
/// Where the control API is unless the operator says otherwise.
pub const DEFAULT_CONTROL_SOCKET: &str = "/run/forwarder/control.sock";
const DEFAULT_MAX_FLOWS: u32 = 262_144;
const DEFAULT_MAX_SLOTS: u32 = 4_194_304;
const DEFAULT_MAX_PERSISTENT_CLIENTS: u32 = 65_536;
/// Where the agent's pins are.
pub const DEFAULT_PIN_DIRECTORY: &str = "/sys/fs/bpf/forwarder";
const DEFAULT_WEIGHT: u16 = 1;
/// Idle flows live this long unless the listener says otherwise.
pub const DEFAULT_IDLE_TIMEOUT: Duration = Duration::from_secs(300);
/// RFC 5508 REQ-1: no less.
const DEFAULT_ICMP_IDLE_TIMEOUT: Duration = Duration::from_secs(60);
/// Linux gives up on a SYN after 6 retries, 127 s in all; RFC 5382 REQ-5 lets a NAT drop a partial open
/// after 4 minutes. A client that has not sent a SYN for this long has given up or will open anew.
pub const DEFAULT_HALF_OPEN_TIMEOUT: Duration = Duration::from_secs(75);
/// A host has as many addresses out of its link's /64 as it likes, and changes them (RFC 8981).
const DEFAULT_PERSISTENCE_PREFIX_V6: u8 = 64;
/// As for persistence: whoever has one address of IPv6 has all of its /64.
const DEFAULT_SOURCE_PREFIX_V6: u8 = 64;
const DEFAULT_REJECTED: u32 = 5;
const DEFAULT_SILENT: u32 = 5;
const DEFAULT_SILENT_AFTER: Duration = Duration::from_millis(500);
const DEFAULT_MAX_EJECTED_PERCENT: u8 = 50;
const DEFAULT_EJECTION_TIME: Duration = Duration::from_secs(10);
const DEFAULT_MAX_EJECTION_TIME: Duration = Duration::from_secs(300);

/// Checks the document as a whole and completes it; what is wrong goes to `report`.
///
/// # Errors
/// [`Reported`] when an object could not be built. `Ok` alone does not mean that nothing was reported: the
/// report says that.
pub fn validate(document: &Document, report: &Report) -> Result<Config, Reported> {
    let check = Check { document, report };
    check.devices();
    check.prefixes();
    check.listeners();
    let agent = check.agent();
    // What is wrong with it is reported with it.
    let max_flows = agent.as_ref().map_or(DEFAULT_MAX_FLOWS, |agent| agent.max_flows);
    let snat = check.snat(max_flows);
    if let (Ok(agent), Ok(pool)) = (&agent, &snat) {
        check.capacity(agent.max_flows, pool);
    }
    let interfaces = convert(&document.interfaces, |_, interface| {
        Ok(Interface {
            mode: or(&interface.mode, XdpMode::Auto)?,
            redirect: or(&interface.redirect, Redirect::Auto)?,
        })
    });
    let tunnels = convert(&document.tunnels, |name, tunnel| check.tunnel(name, tunnel));
    let networks = convert(&document.networks, |name, network| check.network(name, network));
    let groups = convert(&document.groups, |name, group| check.group(name, group));
    if let (Ok(agent), Ok(groups)) = (&agent, &groups) {
        check.slots(agent.max_slots, groups);
    }
    let listeners = convert(&document.listeners, |name, listener| {
        check.listener(name, listener)
    });
    Ok(Config {
        agent: agent?,
        interfaces: interfaces?,
        tunnels: tunnels?,
        snat: snat?,
        networks: networks?,
        groups: groups?,
        listeners: listeners?,
    })
}

/// Converts every entry, also after one that fails.
fn convert<T, U>(
    entries: &Named<T>,
    mut each: impl FnMut(&str, &T) -> Result<U, Reported>,
) -> Result<BTreeMap<String, U>, Reported> {
    let converted: Vec<_> = entries
        .as_ref()
        .map_err(|reported| *reported)?
        .iter()
        .map(|(name, entry)| {
            Ok((
                name.clone(),
                each(name, entry.body.as_ref().map_err(|reported| *reported)?)?,
            ))
        })
        .collect();
    converted.into_iter().collect()
}

/// The entries that could be read.
fn readable<T>(entries: &Named<T>) -> impl Iterator<Item = (&str, &Entry<T>, &T)> {
    entries
        .iter()
        .flatten()
        .filter_map(|(name, entry)| Some((name.as_str(), entry, entry.body.as_ref().ok()?)))
}

/// The value of an optional key, or its default.
pub(super) fn or<T: Clone>(field: &OptionalField<T>, default: T) -> Result<T, Reported> {
    Ok(option(field)?.unwrap_or(default))
}

pub(super) fn option<T: Clone>(field: &OptionalField<T>) -> Result<Option<T>, Reported> {
    match field {
        Ok(field) => Ok(field.as_ref().map(|field| field.value.clone())),
        Err(reported) => Err(*reported),
    }
}

pub(super) fn required<T: Clone>(field: &Field<T>) -> Result<T, Reported> {
    match field {
        Ok(field) => Ok(field.value.clone()),
        Err(reported) => Err(*reported),
    }
}

/// Every entry of a list, if every entry could be read.
pub(super) fn all<T: Clone>(list: &[Field<T>]) -> Result<Vec<T>, Reported> {
    list.iter().map(required).collect()
}

fn join(items: &[impl Display]) -> String {
    items
        .iter()
        .map(ToString::to_string)
        .collect::<Vec<_>>()
        .join(", ")
}

/// An address or prefix that a key holds, to be compared with others.
#[derive(Clone)]
struct Claim<K> {
    key: K,
    at: usize,
    /// Who holds it, as messages name it.
    owner: String,
}

/// Pairs of (first, later) claims to the same key, in the order of the file.
fn doubles<K: Ord + Clone>(mut claims: Vec<Claim<K>>) -> Vec<(Claim<K>, Claim<K>)> {
    claims.sort_by_key(|claim| claim.at);
    let mut first: BTreeMap<K, Claim<K>> = BTreeMap::new();
    let mut doubles = Vec::new();
    for claim in claims {
        match first.entry(claim.key.clone()) {
            btree_map::Entry::Vacant(entry) => drop(entry.insert(claim)),
            btree_map::Entry::Occupied(entry) => doubles.push((entry.get().clone(), claim)),
        }
    }
    doubles
}

/// Pairs of (first, later) ranges of ports of which neither is the other nor a single port. A single port inside a
/// range is no conflict: it goes before the range, and any narrower range before "any".
fn crossing(claims: Vec<Claim<ListenerClaim>>) -> Vec<(Claim<ListenerClaim>, Claim<ListenerClaim>)> {
    let mut ranges: Vec<_> = claims
        .into_iter()
        .filter(|claim| claim.key.2.single().is_none() && claim.key.2 != Ports::ANY)
        .collect();
    ranges.sort_by_key(|claim| claim.key);
    let mut crossing = Vec::new();
    let mut widest: Option<&Claim<ListenerClaim>> = None;
    for claim in &ranges {
        let (vip, protocol, ports) = claim.key;
        let before = widest.filter(|before| (before.key.0, before.key.1) == (vip, protocol));
        if let Some(before) = before.filter(|before| before.key.2 != ports && before.key.2.overlaps(ports)) {
            let (first, later) = if before.at < claim.at {
                (before, claim)
            } else {
                (claim, before)
            };
            crossing.push((first.clone(), later.clone()));
        }
        if before.is_none_or(|before| before.key.2.last < ports.last) {
            widest = Some(claim);
        }
    }
    crossing
}

/// The runs of addresses that prefixes of one family have for traffic besides the probe address. Of IPv6 as many as
/// `max_flows` flows can use, as there are more than can be counted; and the addresses of a run have all but their last
/// 32 bits in common, as the data path wants it.
fn runs(prefixes: &[IpNet], probe: Option<IpAddr>, max_flows: u32) -> Vec<(IpAddr, u32)> {
    let mut runs = Vec::new();
    for prefix in prefixes {
        let (first, last) = hosts(*prefix);
        match probe.filter(|probe| (first..=last).contains(probe)) {
            Some(probe) => {
                runs.push((first, count(first, probe).saturating_sub(1)));
                if let Some(next) = plus(probe, 1) {
                    runs.push((next, count(next, last)));
                }
            }
            None => runs.push((first, count(first, last))),
        }
    }
    let mut wanted = max_flows.div_ceil(PORTS_PER_ADDRESS);
    for (first, count) in &mut runs {
        if let IpAddr::V6(first) = first {
            *count = (*count)
                .min(wanted)
                .min((u32::MAX - first.to_bits() as u32).saturating_add(1));
            wanted -= *count;
        }
    }
    runs.retain(|(_, count)| *count > 0);
    runs
}

/// The VIPs of a listener that could be read.
fn vips_of(listener: &schema::Listener) -> impl Iterator<Item = At<IpAddr>> + '_ {
    let one = listener.vip.iter().flatten().copied();
    let many = listener
        .vips
        .iter()
        .flatten()
        .flat_map(|list| list.value.iter().flatten().copied());
    one.chain(many)
}

/// What a listener listens on.
type ListenerClaim = (IpAddr, Protocol, Ports);

struct Check<'d> {
    document: &'d Document,
    report: &'d Report,
}

impl<'d> Check<'d> {
    fn error(
        &self,
        at: impl Into<Option<usize>>,
        what: impl Into<String>,
        hint: impl Into<String>,
    ) -> Reported {
        self.report.error(at, Error::usage(what).hint(hint))
    }

    fn line(&self, at: usize) -> String {
        format!("line {}", self.report.line(at))
    }

    /// XDP and tcx on one device would both take its packets.
    fn devices(&self) {
        let interfaces = self.document.interfaces.iter().flatten();
        let tunnels = self.document.tunnels.as_ref().ok();
        for (name, interface) in interfaces {
            let Some(tunnel) = tunnels.and_then(|tunnels| tunnels.get(name)) else {
                continue;
            };
            let (first, later) = (interface.at.min(tunnel.at), interface.at.max(tunnel.at));
            let (kind, other) = if later == tunnel.at {
                ("tunnel", "an interface")
            } else {
                ("interface", "a tunnel")
            };
            let what = format!("{kind} {name:?} is also {other} ({})", self.line(first));
            self.error(
                later,
                what,
                "a tunnel device is a [tunnel.NAME] only, any other network device an [interface.NAME] only",
            );
        }
    }

    /// The prefixes of all networks and of the SNAT pool: unicast, and none inside another.
    fn prefixes(&self) {
        const POOL: &str = "snat";
        let networks = readable(&self.document.networks)
            .map(|(name, _, network)| (format!("network {name:?}"), &network.cidrs));
        let pool = self
            .document
            .snat
            .iter()
            .map(|snat| (POOL.to_owned(), &snat.prefixes));
        let probes = self.document.snat.iter().filter_map(|snat| {
            let prefixes = snat.probe_prefixes.as_ref().ok()?.as_ref()?;
            Some((POOL.to_owned(), &prefixes.value))
        });
        let mut claims: Vec<Claim<IpNet>> = networks
            .chain(pool)
            .filter_map(|(owner, list)| Some((owner, &list.as_ref().ok()?.value)))
            .chain(probes)
            .flat_map(|(owner, list)| {
                list.iter().flatten().map(move |&At { value: key, at }| Claim {
                    key,
                    at,
                    owner: owner.clone(),
                })
            })
            .collect();
        for Claim { key, at, owner } in &claims {
            if let Some((range, why)) = not_for_hosts(*key) {
                let what = format!("{owner}: {key} overlaps {range}, {why}");
                self.error(*at, what, "write a prefix of unicast addresses");
            }
        }
        // Two prefixes are nested or apart. So in the order of (first address, length, place) whatever
        // overlaps an earlier prefix lies inside the last one that lies in no other.
        claims.sort_by_key(|claim| (claim.key.network(), claim.key.prefix_len(), claim.at));
        let mut outer: Option<&Claim<IpNet>> = None;
        for claim in &claims {
            let Some(outer) = outer.filter(|outer| outer.key.contains(&claim.key)) else {
                outer = Some(claim);
                continue;
            };
            let (first, later) = if outer.at < claim.at {
                (outer, claim)
            } else {
                (claim, outer)
            };
            let of = if first.owner == POOL {
                "the SNAT pool"
            } else {
                &first.owner
            };
            let what = format!(
                "{}: {} overlaps {} of {of} ({})",
                later.owner,
                later.key,
                first.key,
                self.line(first.at),
            );
            let hint = if [&later.owner, &first.owner].iter().any(|owner| *owner == POOL) {
                "back-to-origin addresses are the gateway's alone; take a free prefix out of 100.64.0.0/10, or of IPv6 a \
                 free /64 out of your fd00::/8"
            } else {
                "joined networks need addresses of their own; write the CIDR that is really in use, or renumber"
            };
            self.error(later.at, what, hint);
        }
    }

    /// What listeners may not share.
    fn listeners(&self) {
        let mut claims = Vec::new();
        for (name, entry, listener) in readable(&self.document.listeners) {
            let protocol = or(&listener.protocol, Protocol::Tcp);
            let (Ok(ports), Ok(protocol)) = (or(&listener.port, Ports::NONE), protocol) else {
                continue;
            };
            // One that is written twice is reported where it is.
            let vips: BTreeSet<_> = vips_of(listener).map(|vip| vip.value).collect();
            claims.extend(vips.into_iter().map(|vip| Claim {
                key: (vip, protocol, ports),
                at: entry.at,
                owner: name.to_owned(),
            }));
        }
        for (first, later) in doubles(claims.clone()).into_iter().chain(crossing(claims)) {
            let (vip, protocol, _) = first.key;
            let (ports, protocol) = (later.key.2, protocol.name());
            let port = if ports == Ports::NONE {
                String::new()
            } else {
                format!("port {ports}/")
            };
            let what = format!(
                "listener {:?}: {vip} {port}{protocol} belongs to listener {:?} already ({})",
                later.owner,
                first.owner,
                self.line(first.at),
            );
            self.error(
                later.at,
                what,
                "change the VIP, port or protocol of one, or put the backends into one group",
            );
        }
    }

    fn agent(&self) -> Result<Agent, Reported> {
        let agent = self.document.agent.as_ref().map_err(|reported| *reported)?;
        Ok(Agent {
            metrics_address: or(&agent.metrics_address, DEFAULT_METRICS_ADDRESS)?,
            control_socket: or(&agent.control_socket, PathBuf::from(DEFAULT_CONTROL_SOCKET))?,
            max_flows: or(&agent.max_flows, DEFAULT_MAX_FLOWS)?,
            max_slots: or(&agent.max_slots, DEFAULT_MAX_SLOTS)?,
            max_persistent_clients: or(&agent.max_persistent_clients, DEFAULT_MAX_PERSISTENT_CLIENTS)?,
            pin_directory: or(&agent.pin_directory, PathBuf::from(DEFAULT_PIN_DIRECTORY))?,
            on_stop: or(&agent.on_stop, OnStop::Detach)?,
            reload_on_change: or(&agent.reload_on_change, false)?,
            mss_clamp: or(&agent.mss_clamp, true)?,
            control_group: option(&agent.control_group)?,
            api: self.remote_api(agent)?,
        })
    }

    /// Nobody reads over TCP without showing something, and no token crosses a network in the clear.
    fn remote_api(&self, agent: &schema::Agent) -> Result<Option<RemoteApi>, Reported> {
        let Some(api) = agent.api.as_ref().map_err(|reported| *reported)? else {
            return Ok(None);
        };
        let listen = *api.listen.as_ref().map_err(|reported| *reported)?;
        let (certificate, key) = (option(&api.certificate)?, option(&api.key)?);
        let (token_file, client_ca) = (option(&api.token_file)?, option(&api.client_ca)?);
        let wrong = |what: &str, hint: &str| Err(self.error(listen.at, format!("agent, api: {what}"), hint));
        let tls = match (certificate, key) {
            (Some(certificate), Some(key)) => Some(RemoteTls {
                certificate,
                key,
                client_ca: client_ca.clone(),
            }),
            (None, None) => None,
            _ => {
                return wrong(
                    "certificate and key belong together",
                    "write both, or neither for a loopback address",
                );
            }
        };
        if client_ca.is_none() && token_file.is_none() {
            return wrong(
                "everybody who reaches the address could read",
                "write token_file, or certificate, key and client_ca",
            );
        }
        if client_ca.is_some() && tls.is_none() {
            return wrong(
                "clients show a certificate only over TLS",
                "write certificate and key beside client_ca",
            );
        }
        if tls.is_none() && !listen.value.ip().is_loopback() {
            return wrong(
                &format!(
                    "the token would cross the network to {} unencrypted",
                    listen.value.ip()
                ),
                "write certificate and key, or listen on 127.0.0.1 or ::1",
            );
        }
        Ok(Some(RemoteApi {
            listen: listen.value,
            token_file,
            tls,
        }))
    }

    fn backend_ranges(&self) -> Result<Vec<IpNet>, Reported> {
        let agent = self.document.agent.as_ref().map_err(|reported| *reported)?;
        match &agent.allowed_backend_ranges {
            Ok(Some(ranges)) => all(&ranges.value),
            Ok(None) => Ok(DEFAULT_BACKEND_RANGES.to_vec()),
            Err(reported) => Err(*reported),
        }
    }

    /// The prefix of the SNAT pool that holds `address`.
    fn snat_prefix_of(&self, address: IpAddr) -> Option<IpNet> {
        let prefixes = self.document.snat.as_ref().ok()?.prefixes.as_ref().ok()?;
        prefixes
            .value
            .iter()
            .flatten()
            .map(|prefix| prefix.value)
            .find(|prefix| prefix.contains(&address))
            .or_else(|| {
                let probes = self
                    .document
                    .snat
                    .as_ref()
                    .ok()?
                    .probe_prefixes
                    .as_ref()
                    .ok()?
                    .as_ref()?;
                let prefixes = probes.value.iter().flatten().map(|prefix| prefix.value);
                prefixes.into_iter().find(|prefix| prefix.contains(&address))
            })
    }

    fn snat(&self, max_flows: u32) -> Result<SnatPool, Reported> {
        let snat = self.document.snat.as_ref().map_err(|reported| *reported)?;
        let list = snat.prefixes.as_ref().map_err(|reported| *reported)?;
        let mut prefixes = all(&list.value)?;
        let probe_prefixes = match &snat.probe_prefixes {
            Ok(Some(list)) => all(&list.value)?,
            Ok(None) => Vec::new(),
            Err(reported) => return Err(*reported),
        };
        let mut probes = Vec::new();
        let mut ranges = Vec::new();
        for (is_v4, written) in [(true, &snat.probe_address), (false, &snat.probe_address_v6)] {
            let family = |all: &[IpNet]| -> Vec<IpNet> {
                all.iter()
                    .copied()
                    .filter(|prefix| prefix.addr().is_ipv4() == is_v4)
                    .collect()
            };
            let (traffic, own) = (family(&prefixes), family(&probe_prefixes));
            let (key, probed) = if own.is_empty() {
                ("prefixes", &traffic)
            } else {
                ("probe_prefixes", &own)
            };
            let written = written.as_ref().map_err(|reported| *reported)?;
            let probe = match written {
                Some(probe) => Some(self.probe_address(*probe, key, probed)?),
                None => probed.first().map(|prefix| hosts(*prefix).0),
            };
            let runs = runs(&traffic, probe, max_flows);
            if runs.is_empty() && !traffic.is_empty() {
                return Err(self.error(
                    list.at,
                    "snat: prefixes have no address for traffic besides the probe address",
                    if is_v4 {
                        "a /31 has one address for traffic, a /29 has 5, a /26 has 61"
                    } else {
                        "write a /64, or anything shorter than /128"
                    },
                ));
            }
            if runs.len() > MAX_RANGES {
                let what = format!(
                    "snat: {} runs of addresses of a family are left besides the probe address; at most {MAX_RANGES} \
                     are possible",
                    runs.len(),
                );
                let at = written.map_or(list.at, |probe| probe.at);
                return Err(self.error(
                    at,
                    what,
                    "write fewer prefixes of it; a probe address that is the first or last of a prefix splits none",
                ));
            }
            probes.extend(probe);
            ranges.extend(runs);
        }
        if ranges.is_empty() {
            return Err(self.error(
                list.at,
                "snat: prefixes have no address for traffic",
                "probe_prefixes are for health probes alone: write prefixes for traffic beside them",
            ));
        }
        prefixes.extend(probe_prefixes);
        Ok(SnatPool {
            prefixes,
            probes: probes.into_iter().collect::<PerFamily>(),
            ranges,
        })
    }

    fn probe_address(&self, probe: At<IpAddr>, key: &str, prefixes: &[IpNet]) -> Result<IpAddr, Reported> {
        let address = probe.value;
        let Some(prefix) = prefixes.iter().find(|prefix| prefix.contains(&address)) else {
            let what = format!("snat: probe_address {address} is in none of {key}");
            let hint = if prefixes.is_empty() {
                format!(
                    "snat has no prefix of {}: write one, or take this out",
                    family_name(address)
                )
            } else {
                format!("take an address out of {}", join(prefixes))
            };
            return Err(self.error(probe.at, what, hint));
        };
        let (first, last) = hosts(*prefix);
        if (first..=last).contains(&address) {
            return Ok(address);
        }
        let end = if address < first { "network" } else { "broadcast" };
        let what = format!("snat: probe_address {address} is the {end} address of {prefix}");
        Err(self.error(probe.at, what, format!("take one from {first} to {last}")))
    }

    /// A full-NAT flow holds one (address, port) of the pool, so more flows than those are never reached.
    fn capacity(&self, max_flows: u32, pool: &SnatPool) {
        let flows = pool.bindings();
        let addresses = flows / u64::from(PORTS_PER_ADDRESS);
        // Of two families the smaller pool: a flow has a binding in both.
        if u64::from(max_flows) <= flows {
            return;
        }
        let needed = u64::from(max_flows).div_ceil(u64::from(PORTS_PER_ADDRESS));
        let have = if addresses == 1 {
            "1 address".to_owned()
        } else {
            format!("{addresses} addresses")
        };
        let pool = format!("({have} for traffic, {PORTS_PER_ADDRESS} ports each)");
        let written = self
            .document
            .agent
            .as_ref()
            .ok()
            .and_then(|agent| agent.max_flows.ok().flatten());
        let prefixes = self
            .document
            .snat
            .as_ref()
            .ok()
            .and_then(|snat| snat.prefixes.as_ref().ok());
        let (at, what) = match written {
            Some(max_flows) => (
                Some(max_flows.at),
                format!(
                    "agent: max_flows is {}, but the SNAT pool has room for {flows} {pool}",
                    max_flows.value
                ),
            ),
            None => (
                prefixes.map(|prefixes| prefixes.at),
                format!(
                    "snat: prefixes have room for {flows} flows {pool}, but max_flows is {max_flows} by default"
                ),
            ),
        };
        let hint = format!(
            "{max_flows} flows need {needed} addresses for traffic: write larger or more prefixes, or max_flows = {flows} or less below [agent]"
        );
        self.error(at, what, hint);
    }

    /// Every group has a Maglev table, and the next one is built beside it.
    fn slots(&self, max_slots: u32, groups: &BTreeMap<String, Group>) {
        let tables = groups
            .values()
            .map(|group| u64::from(TableSizes::of(group, groups).sum()));
        let needed = 2 * tables.sum::<u64>();
        if needed > u64::from(max_slots) {
            let written = self
                .document
                .agent
                .as_ref()
                .ok()
                .and_then(|agent| agent.max_slots.ok().flatten());
            let what = format!("agent: max_slots is {max_slots}, but the backend groups need {needed}");
            self.error(
                written.map(|max_slots| max_slots.at),
                what,
                format!("write max_slots = {needed} or more below [agent]"),
            );
        }
    }

    fn tunnel(&self, name: &str, tunnel: &schema::Tunnel) -> Result<Tunnel, Reported> {
        let place = format!("tunnel {name:?}");
        let health = match tunnel.health.as_ref().map_err(|reported| *reported)? {
            Some(health) => Some(tunnel_check(self.report, &place, health)?),
            None => None,
        };
        Ok(Tunnel {
            mode: or(&tunnel.mode, TunnelMode::Auto)?,
            made: self.made_tunnel(&place, tunnel)?,
            health,
        })
    }

    /// The device that the agent is to make for a tunnel.
    fn made_tunnel(&self, place: &str, tunnel: &schema::Tunnel) -> Result<Option<MadeTunnel>, Reported> {
        let kind = match &tunnel.kind {
            Ok(kind) => kind.as_ref(),
            Err(reported) => return Err(*reported),
        };
        let (local, remote) = (option(&tunnel.local)?, option(&tunnel.remote)?);
        let (vni, key, port) = (option(&tunnel.vni)?, option(&tunnel.key)?, option(&tunnel.port)?);
        let Some(kind) = kind else {
            let rest = [
                ("remote", remote.is_some()),
                ("local", local.is_some()),
                ("vni", vni.is_some()),
                ("key", key.is_some()),
                ("port", port.is_some()),
                ("ttl", option(&tunnel.ttl)?.is_some()),
                ("mtu", option(&tunnel.mtu)?.is_some()),
            ];
            let Some((name, _)) = rest.iter().find(|(_, is_written)| *is_written) else {
                return Ok(None);
            };
            let what = format!("{place}: {name} is for a tunnel whose device the agent makes");
            return Err(self.error(None, what, "write kind as well, or make the device yourself"));
        };
        let wrong = |what: &str, hint: &str| Err(self.error(kind.at, format!("{place}: {what}"), hint));
        let is_vni = matches!(kind.value, MadeKind::Vxlan | MadeKind::Geneve);
        let is_gre = matches!(kind.value, MadeKind::Gre | MadeKind::Gretap);
        let Some(remote) = remote else {
            return wrong("remote is missing", "write the address of the far end");
        };
        if local.is_some_and(|local| local.is_ipv4() != remote.is_ipv4()) {
            return wrong(
                "local and remote are of two families",
                "write both as IPv4 or as IPv6",
            );
        }
        if is_vni && vni.is_none() {
            return wrong(
                "vni is missing",
                "write the number of the network, as at the far end",
            );
        }
        if (!is_vni && (vni.is_some() || port.is_some())) || (!is_gre && key.is_some()) {
            return wrong(
                "it has keys of another kind",
                "vni and port are for vxlan and geneve, key is for gre and gretap",
            );
        }
        Ok(Some(MadeTunnel {
            kind: kind.value,
            remote,
            local,
            id: vni.or(key),
            port,
            ttl: or(&tunnel.ttl, 64)?,
            mtu_bytes: option(&tunnel.mtu)?,
        }))
    }

    fn network(&self, name: &str, network: &schema::Network) -> Result<Network, Reported> {
        let cidrs = network
            .cidrs
            .as_ref()
            .map_err(|reported| *reported)
            .and_then(|list| all(&list.value));
        let tunnel = match (&network.tunnel, &self.document.tunnels) {
            (Ok(Some(tunnel)), Ok(tunnels)) => {
                let place = format!("network {name:?}: tunnel");
                self.reference(&place, tunnel, tunnels, "tunnel").map(Some)
            }
            (tunnel, _) => option(tunnel),
        };
        let table = match (option(&network.table)?, &network.vrf) {
            (Some(_), Ok(Some(vrf))) => {
                let what = format!("network {name:?}: table and vrf exclude each other");
                return Err(self.error(vrf.at, what, "a VRF has a table of its own: remove table"));
            }
            (_, Err(reported)) => return Err(*reported),
            (None, Ok(vrf)) => vrf.as_ref().map(|vrf| RoutingTable::Vrf(vrf.value.clone())),
            (Some(number), Ok(None)) => Some(RoutingTable::Number(number)),
        };
        Ok(Network {
            cidrs: cidrs?,
            tunnel: tunnel?,
            table,
        })
    }

    /// The name, if one of `known` has it. `subject` is who refers to it, `kind` the kind of table it names.
    fn reference<T>(
        &self,
        subject: &str,
        name: &At<String>,
        known: &BTreeMap<String, Entry<T>>,
        kind: &str,
    ) -> Result<String, Reported> {
        if known.contains_key(&name.value) {
            return Ok(name.value.clone());
        }
        let names: Vec<&str> = known.keys().map(String::as_str).collect();
        let list = names.join(", ");
        let hint = match did_you_mean(&name.value, names) {
            Some(similar) => format!("did you mean {similar:?}?  Known {kind}s: {list}"),
            None if list.is_empty() => format!("there is no {kind} yet: write a table [{kind}.NAME]"),
            None => format!("Known {kind}s: {list}"),
        };
        Err(self.error(
            name.at,
            format!("{subject} {:?} does not exist", name.value),
            hint,
        ))
    }

    fn group(&self, name: &str, group: &schema::Group) -> Result<Group, Reported> {
        let place = format!("group {name:?}");
        let claims = readable(&group.backends).filter_map(|(name, entry, backend)| {
            let address = backend.address.as_ref().ok()?.value;
            let port = option(&backend.port).ok()?;
            Some(Claim {
                key: (address, port),
                at: entry.at,
                owner: name.to_owned(),
            })
        });
        for (first, later) in doubles(claims.collect()) {
            let (address, port) = first.key;
            let port = port.map_or_else(String::new, |port| format!(" port {port}"));
            let what = format!(
                "{place}, backend {:?}: {address}{port} is backend {:?} already ({})",
                later.owner,
                first.owner,
                self.line(first.at),
            );
            self.error(later.at, what, "to send a server more flows, raise its weight");
        }
        let health = group
            .health
            .as_ref()
            .map_err(|reported| *reported)
            .and_then(|health| group_check(self.report, &place, health, self.default_kind(name)));
        let passive = self.passive(&place, name, group);
        let backends = convert(&group.backends, |name, backend| {
            self.backend(&format!("{place}, backend {name:?}"), backend)
        });
        if let (Ok(backends), Ok(entries), Ok(groups)) = (&backends, &group.backends, &self.document.groups) {
            let at = groups.get(name).map(|entry| entry.at);
            if entries.len() > MAX_BACKENDS {
                let what = format!("{place}: {} backends are more than {MAX_BACKENDS}", entries.len());
                self.error(
                    at,
                    what,
                    "spread them over several groups, each with its listener",
                );
            }
            if backends.values().all(|backend| backend.weight == 0) {
                let what = format!("{place}: every backend has weight 0, so no flow would find one");
                self.error(at, what, "give at least one backend a weight of 1 or more");
            }
            if backends.values().all(|backend| backend.tier > 0) {
                let what = format!("{place}: no backend is of tier 0, which is used first");
                self.error(at, what, "number tiers from 0 on");
            }
        }
        if let Ok(NatMode::Dnat) = or(&group.nat, NatMode::Full) {
            self.one_family(&place, name, group);
        }
        let remote_ip = or(&group.remote_ip, true)?;
        if !remote_ip {
            self.local_backends(&place, group);
        }
        if let Ok(health) = &health {
            self.backend_ports(&place, name, group, health.as_ref());
        }
        Ok(Group {
            nat: or(&group.nat, NatMode::Full)?,
            remote_ip,
            selection: or(&group.selection, Selection::Maglev)?,
            persistence: self.persistence(&place, group)?,
            on_unhealthy: or(&group.on_unhealthy, OnUnhealthy::Keep)?,
            slow_start: or(&group.slow_start, Duration::ZERO)?,
            min_healthy_percent: or(&group.min_healthy_percent, 0)?,
            backup: self.backup(name, &place, group)?,
            health: health?,
            passive: passive?,
            backends: backends?,
        })
    }

    /// The backup group, which must exist, have the same NAT mode, and not lead back here.
    fn backup(&self, name: &str, place: &str, group: &schema::Group) -> Result<Option<String>, Reported> {
        let (Some(backup), Ok(groups)) = (
            group.backup.as_ref().map_err(|reported| *reported)?,
            &self.document.groups,
        ) else {
            return option(&group.backup);
        };
        let found = self.reference(&format!("{place}: backup"), backup, groups, "group")?;
        let body = |name: &str| groups.get(name).and_then(|entry| entry.body.as_ref().ok());
        let nat = |group: &schema::Group| or(&group.nat, NatMode::Full).ok();
        if let Some(other) = body(&found)
            && nat(other) != nat(group)
        {
            return Err(self.error(
                backup.at,
                format!("{place}: backup {found:?} has another NAT mode"),
                "servers behind one listener see the same kind of client address: give both groups the same nat",
            ));
        }
        let mut next = Some(found.clone());
        for _ in 0..groups.len() {
            let Some(current) = next else { break };
            if current == name {
                return Err(self.error(
                    backup.at,
                    format!("{place}: backup {found:?} leads back to this group"),
                    "a backup group is a last resort; remove one of the backup keys",
                ));
            }
            next = body(&current).and_then(|group| option(&group.backup).ok().flatten());
        }
        Ok(Some(found))
    }

    fn persistence(&self, place: &str, group: &schema::Group) -> Result<Option<Persistence>, Reported> {
        let prefix_bits_v4 = or(&group.persistence_prefix, *schema::PERSISTENCE_PREFIX.end())?;
        let prefix_bits_v6 = or(&group.persistence_prefix_v6, DEFAULT_PERSISTENCE_PREFIX_V6)?;
        if let Some(timeout) = option(&group.persistence_timeout)? {
            return Ok(Some(Persistence {
                timeout,
                prefix_bits_v4,
                prefix_bits_v6,
            }));
        }
        for (key, prefix) in [
            ("persistence_prefix", &group.persistence_prefix),
            ("persistence_prefix_v6", &group.persistence_prefix_v6),
        ] {
            if let Ok(Some(prefix)) = prefix {
                return Err(self.error(
                    prefix.at,
                    format!("{place}: {key} says how many clients are one, but there is no persistence"),
                    "write persistence_timeout = \"10m\", or take it out",
                ));
            }
        }
        Ok(None)
    }

    /// With `remote_ip = false` every backend is in a network that is reached without a tunnel.
    fn local_backends(&self, place: &str, group: &schema::Group) {
        let local: Vec<IpNet> = readable(&self.document.networks)
            .filter(|(_, _, network)| matches!(network.tunnel, Ok(None)))
            .flat_map(|(_, _, network)| {
                network
                    .cidrs
                    .iter()
                    .flat_map(|cidrs| cidrs.value.iter().flatten())
            })
            .map(|cidr| cidr.value)
            .collect();
        for (name, _, backend) in readable(&group.backends) {
            let Ok(At { value: address, at }) = backend.address else {
                continue;
            };
            if local.iter().any(|cidr| cidr.contains(&address)) {
                continue;
            }
            let what = format!("{place}, backend {name:?}: {address} is remote, and remote_ip is false");
            let hint = if local.is_empty() {
                "write the CIDRs beside the gateway into a [network.NAME] without tunnel, or remote_ip = true"
                    .to_owned()
            } else {
                format!(
                    "networks without a tunnel have {}; take the backend out, or write remote_ip = true",
                    join(&local)
                )
            };
            self.error(at, what, hint);
        }
    }

    /// A backend without a port of its own is for listeners with many, and has to be probed somewhere.
    fn backend_ports(
        &self,
        place: &str,
        group_name: &str,
        group: &schema::Group,
        health: Option<&HealthCheck>,
    ) {
        let ports: Vec<Option<Ports>> = readable(&self.document.listeners)
            .filter(|(_, _, listener)| {
                let group = listener.group.as_ref();
                group.is_ok_and(|group| group.value == group_name)
            })
            .filter_map(|(_, _, listener)| option(&listener.port).ok())
            .collect();
        // Listeners of ICMP need none.
        let is_needed = ports.is_empty() || ports.iter().flatten().any(|ports| ports.single().is_some());
        for (name, entry, backend) in readable(&group.backends) {
            if !matches!(backend.port, Ok(None)) {
                continue;
            }
            if is_needed {
                let what = format!("{place}, backend {name:?}: port is missing");
                let hint = "for example: port = 8080. Only for listeners with a range of ports, or of ICMP, it may be left \
                            out: then each flow keeps the port that the client asked for";
                self.error(entry.at, what, hint);
            } else if health.is_some_and(|health| health.port.is_none() && health.probe.needs_port()) {
                let what = format!("{place}, backend {name:?}: it has no port, so there is none to probe");
                let hint = format!(
                    "write port = ... below [group.{group_name}.health], or kind = \"icmp\" or \"none\""
                );
                self.error(entry.at, what, hint);
            }
        }
    }

    fn backend(&self, place: &str, backend: &schema::Backend) -> Result<Backend, Reported> {
        if let Ok(address) = &backend.address {
            self.backend_address(place, address);
        }
        Ok(Backend {
            address: required(&backend.address)?,
            port: option(&backend.port)?,
            weight: or(&backend.weight, DEFAULT_WEIGHT)?,
            max_flows: option(&backend.max_flows)?,
            tier: or(&backend.tier, 0)?,
        })
    }

    fn backend_address(&self, place: &str, &At { value: address, at }: &At<IpAddr>) {
        let vip = readable(&self.document.listeners)
            .flat_map(|(name, _, listener)| vips_of(listener).map(move |vip| (name, vip)))
            .filter(|(_, vip)| vip.value == address)
            .min_by_key(|(_, vip)| vip.at);
        if let Some((listener, vip)) = vip {
            let line = self.line(vip.at);
            let what = format!(
                "{place}: {address} is the VIP of listener {listener:?} ({line}), so packets would loop"
            );
            self.error(at, what, "write the server's own address");
        } else if let Some(prefix) = self.snat_prefix_of(address) {
            let what = format!("{place}: {address} is in the SNAT pool ({prefix}), so packets would loop");
            self.error(
                at,
                what,
                "write the server's own address, or take the SNAT pool from elsewhere",
            );
        } else if let Some((range, why)) = not_for_hosts(address.into()) {
            self.error(
                at,
                format!("{place}: {address} is in {range}, {why}"),
                "write the server's own address",
            );
        } else if let Ok(ranges) = self.backend_ranges()
            && !ranges.iter().any(|range| range.contains(&address))
        {
            let what = format!(
                "{place}: {address} is outside the allowed ranges {}",
                join(&ranges)
            );
            self.error(
                at,
                what,
                "write the server's private address, or allow its range: allowed_backend_ranges below [agent]",
            );
        } else if !self.pool_has_family(address) {
            let family = family_name(address);
            let what = format!("{place}: {address} is {family}, and snat.prefixes has no {family} prefix");
            let hint = if address.is_ipv4() {
                "requests and probes leave from the pool's address of the backend's family: add \"100.64.0.0/26\" or the \
                 like to snat.prefixes"
            } else {
                "requests and probes leave from the pool's address of the backend's family: add a free /64 out of your \
                 fd00::/8 to snat.prefixes"
            };
            self.error(at, what, hint);
        }
    }

    /// Has the pool addresses of the family of `address`, or could that not be read?
    fn pool_has_family(&self, address: IpAddr) -> bool {
        let prefixes = self.document.snat.as_ref().map(|snat| snat.prefixes.as_ref());
        let Ok(Ok(prefixes)) = prefixes else {
            return true;
        };
        prefixes.value.iter().any(|prefix| match prefix {
            Ok(prefix) => prefix.value.addr().is_ipv4() == address.is_ipv4(),
            Err(_) => true,
        })
    }

    /// With DNAT the server sees the client's address, so client and server are of one family.
    fn one_family(&self, place: &str, group_name: &str, group: &schema::Group) {
        let listeners = readable(&self.document.listeners).filter(|(_, _, listener)| {
            let group = listener.group.as_ref();
            group.is_ok_and(|group| group.value == group_name)
        });
        let vips: Vec<_> = listeners
            .flat_map(|(name, _, listener)| vips_of(listener).map(move |vip| (name, vip.value)))
            .collect();
        for (name, _, backend) in readable(&group.backends) {
            let Ok(At { value: address, at }) = backend.address else {
                continue;
            };
            let other = vips.iter().find(|(_, vip)| vip.is_ipv4() != address.is_ipv4());
            if let Some((listener, vip)) = other {
                let what = format!(
                    "{place}, backend {name:?}: {address} is {}, but VIP {vip} of listener {listener:?} is {}, and DNAT \
                     keeps the client's address",
                    family_name(address),
                    family_name(*vip),
                );
                let hint = "write nat = \"full\", which translates between the families, or a listener and a group for \
                            each family";
                self.error(at, what, hint);
            }
        }
    }

    /// The kind of check of a group that says nothing of it: a handshake, if it serves TCP at all, as a server of
    /// something else need not have a TCP port. What serves UDP only is sent datagrams, all others echo requests.
    fn default_kind(&self, group_name: &str) -> HealthKind {
        let protocols: Vec<_> = readable(&self.document.listeners)
            .filter(|(_, _, listener)| {
                let group = listener.group.as_ref();
                group.is_ok_and(|group| group.value == group_name)
            })
            .map(|(_, _, listener)| or(&listener.protocol, Protocol::Tcp).unwrap_or(Protocol::Tcp))
            .collect();
        if protocols.is_empty() || protocols.contains(&Protocol::Tcp) {
            HealthKind::Tcp
        } else if protocols.iter().all(|protocol| *protocol == Protocol::Udp) {
            HealthKind::Udp
        } else {
            HealthKind::Icmp
        }
    }

    fn passive(&self, place: &str, name: &str, group: &schema::Group) -> Result<Option<Passive>, Reported> {
        let written = group.passive.as_ref().map_err(|reported| *reported)?;
        // A closed port is no fault of a server that is asked for whatever port the client wants.
        let has_ports = readable(&group.backends).all(|(_, _, backend)| !matches!(backend.port, Ok(None)));
        // UDP need not be answered at all, nor echo requests.
        let has_udp = readable(&self.document.listeners).any(|(_, _, listener)| {
            let is_here = listener.group.as_ref().is_ok_and(|group| group.value == name);
            is_here && or(&listener.protocol, Protocol::Tcp).is_ok_and(|it| !it.has_connections())
        });
        let count = |default, is_on| if is_on { default } else { 0 };
        let rejected = or(&written.rejected, count(DEFAULT_REJECTED, has_ports))?;
        let silent = or(&written.silent, count(DEFAULT_SILENT, has_ports && !has_udp))?;
        let ejection_time = or(&written.ejection_time, DEFAULT_EJECTION_TIME)?;
        let max_ejection_time = or(
            &written.max_ejection_time,
            DEFAULT_MAX_EJECTION_TIME.max(ejection_time),
        )?;
        if let (Ok(Some(longest)), true) = (&written.max_ejection_time, max_ejection_time < ejection_time) {
            let what = format!(
                "{place}, passive: max_ejection_time is {} s, less than ejection_time, {} s",
                max_ejection_time.as_secs_f64(),
                ejection_time.as_secs_f64()
            );
            self.error(
                longest.at,
                what,
                "ejection_time is the first one's length, max_ejection_time the longest: raise it, or leave it out",
            );
        }
        let passive = Passive {
            rejected: (rejected > 0).then_some(rejected),
            silent: (silent > 0).then_some(silent),
            silent_after: or(&written.silent_after, DEFAULT_SILENT_AFTER)?,
            counts_requests: !has_udp,
            max_ejected_percent: or(&written.max_ejected_percent, DEFAULT_MAX_EJECTED_PERCENT)?,
            ejection_time,
            max_ejection_time,
        };
        let is_on = or(&written.enabled, true)?;
        let has_sign = passive.rejected.is_some() || passive.silent.is_some();
        Ok((is_on && has_sign).then_some(passive))
    }

    fn listener(&self, name: &str, listener: &schema::Listener) -> Result<Listener, Reported> {
        let place = format!("listener {name:?}");
        let vips = self.vips(name, &place, listener);
        let group = match (&listener.group, &self.document.groups) {
            (Ok(group), Ok(groups)) => {
                self.reference(&format!("{place}: backend group"), group, groups, "group")
            }
            (group, _) => required(group),
        };
        let protocol = or(&listener.protocol, Protocol::Tcp)?;
        if !protocol.has_connections() {
            self.connections_only(&place, protocol, listener);
        }
        let idle_timeout = or(
            &listener.idle_timeout,
            if protocol == Protocol::Icmp {
                DEFAULT_ICMP_IDLE_TIMEOUT
            } else {
                DEFAULT_IDLE_TIMEOUT
            },
        )?;
        let ports = self.listener_ports(&place, protocol, listener);
        let sources = match &listener.sources {
            Ok(Some(list)) => {
                let written = all(&list.value)?.into_iter();
                let clients: Vec<_> = written.flat_map(without_mapped).collect();
                Some(IpNet::aggregate(&clients))
            }
            Ok(None) => None,
            Err(reported) => return Err(*reported),
        };
        Ok(Listener {
            vips: vips?,
            ports: ports?,
            protocol,
            group: group?,
            sources,
            max_flows: option(&listener.max_flows)?,
            idle_timeout,
            closing_timeout: or(&listener.closing_timeout, idle_timeout)?,
            half_open_timeout: or(&listener.half_open_timeout, DEFAULT_HALF_OPEN_TIMEOUT)?,
            reset_on_idle: or(&listener.reset_on_idle, false)?,
            syn_cookies: self.syn_cookies(&place, protocol, listener)?,
            source_rate: self.source_rate(&place, listener)?,
        })
    }

    fn syn_cookies(
        &self,
        place: &str,
        protocol: Protocol,
        listener: &schema::Listener,
    ) -> Result<Option<SynCookies>, Reported> {
        let Some(At { value, at }) = listener.syn_cookies.as_ref().map_err(|reported| *reported)? else {
            return Ok(None);
        };
        if value.is_some() && protocol != Protocol::Tcp {
            return Err(self.error(
                *at,
                format!("{place}: syn_cookies is for protocol = \"tcp\" only"),
                "the others have no SYN: remove it",
            ));
        }
        Ok(*value)
    }

    fn source_rate(&self, place: &str, listener: &schema::Listener) -> Result<Option<SourceRate>, Reported> {
        let burst = listener.source_burst.as_ref().map_err(|reported| *reported)?;
        let prefix_bits_v4 = or(&listener.source_prefix, *schema::PERSISTENCE_PREFIX.end())?;
        let prefix_bits_v6 = or(&listener.source_prefix_v6, DEFAULT_SOURCE_PREFIX_V6)?;
        if let Some(flows_per_second) = option(&listener.source_rate)? {
            if let Some(At { value, at }) = burst
                && *value < flows_per_second
            {
                return Err(self.error(
                    *at,
                    format!(
                        "{place}: source_burst is {value}, less than the {flows_per_second} of source_rate"
                    ),
                    "what a second brings must fit: raise source_burst, or take it out",
                ));
            }
            return Ok(Some(SourceRate {
                flows_per_second,
                burst: burst
                    .as_ref()
                    .map_or(flows_per_second.saturating_mul(2), |burst| burst.value),
                prefix_bits_v4,
                prefix_bits_v6,
            }));
        }
        let place_of =
            |field: &OptionalField<u8>| field.as_ref().ok().and_then(|field| Some(field.as_ref()?.at));
        for (key, at) in [
            ("source_burst", burst.as_ref().map(|burst| burst.at)),
            ("source_prefix", place_of(&listener.source_prefix)),
            ("source_prefix_v6", place_of(&listener.source_prefix_v6)),
        ] {
            if let Some(at) = at {
                return Err(self.error(
                    at,
                    format!("{place}: {key} is about the rate of a source, but there is none"),
                    "write source_rate = 100, or take it out",
                ));
            }
        }
        Ok(None)
    }

    fn listener_ports(
        &self,
        place: &str,
        protocol: Protocol,
        listener: &schema::Listener,
    ) -> Result<Ports, Reported> {
        match listener.port.as_ref().map_err(|reported| *reported)? {
            None => Ok(Ports::NONE),
            Some(At { value, .. }) if protocol != Protocol::Icmp => Ok(*value),
            Some(At { at, .. }) => Err(self.error(
                *at,
                format!("{place}: port is not for protocol = \"icmp\""),
                "echo requests have no port: remove it",
            )),
        }
    }

    /// What a listener without connections has nothing to do with.
    fn connections_only(&self, place: &str, protocol: Protocol, listener: &schema::Listener) {
        let at_of = |field: &OptionalField<Duration>| Some(field.as_ref().ok()?.as_ref()?.at);
        let keys = [
            ("closing_timeout", at_of(&listener.closing_timeout)),
            ("half_open_timeout", at_of(&listener.half_open_timeout)),
            (
                "reset_on_idle",
                listener
                    .reset_on_idle
                    .as_ref()
                    .ok()
                    .and_then(|reset| Some(reset.as_ref()?.at)),
            ),
        ];
        for (key, at) in keys {
            if let Some(at) = at {
                let what = format!("{place}: {key} is for protocol = \"tcp\" and \"sctp\" only");
                let name = protocol.name().to_uppercase();
                self.error(at, what, format!("{name} knows idle_timeout only: remove {key}"));
            }
        }
    }

    /// The VIPs of `vip` or `vips`: one of the two is there, and no address is there twice.
    fn vips(&self, name: &str, place: &str, listener: &schema::Listener) -> Result<Vec<IpAddr>, Reported> {
        let one = listener.vip.as_ref().map_err(|reported| *reported)?;
        let many = listener.vips.as_ref().map_err(|reported| *reported)?;
        let entry_at = || {
            let listeners = self.document.listeners.as_ref().ok()?;
            listeners.get(name).map(|entry| entry.at)
        };
        let vips = match (one, many) {
            (Some(vip), None) => vec![*vip],
            (None, Some(list)) => list.value.iter().copied().collect::<Result<Vec<_>, _>>()?,
            (Some(_), Some(list)) => {
                return Err(self.error(
                    list.at,
                    format!("{place}: vip and vips exclude each other"),
                    "write all addresses into vips",
                ));
            }
            (None, None) => {
                return Err(self.error(
                    entry_at(),
                    format!("{place}: vip is missing"),
                    "for example: vip = \"172.16.0.100\", or of both families: vips = [\"172.16.0.100\", \"fd00::100\"]",
                ));
            }
        };
        let mut seen = BTreeSet::new();
        for vip in &vips {
            self.vip(place, vip);
            if !seen.insert(vip.value) {
                let what = format!("{place}: {} is in vips twice", vip.value);
                self.error(vip.at, what, "write it once");
            }
        }
        Ok(vips.into_iter().map(|vip| vip.value).collect())
    }

    fn vip(&self, place: &str, vip: &At<IpAddr>) {
        let At { value: address, at } = *vip;
        if let Some((range, why)) = not_for_hosts(address.into()) {
            let what = format!("{place}: vip {address} is in {range}, {why}");
            self.error(at, what, "write the address that clients connect to");
        } else if let Some(prefix) = self.snat_prefix_of(address) {
            self.error(
                at,
                format!("{place}: vip {address} is in the SNAT pool ({prefix})"),
                "the pool's addresses are for connections to backends; write another VIP or another pool",
            );
        }
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::{
        config::{HttpProbe, Method, Probe, StatusRange, Trust, TunnelCheck, load::parse},
        error::Errors,
    };

    #[test]
    fn passive_signs_are_off_where_a_living_server_may_show_them() {
        let group = |passive: &str, port: &str, listener: &str| {
            let text = format!(
                "[snat]\nprefixes = [\"100.64.0.0/26\"]\n[interface.eth0]\n[group.web.health]\nport = 80\n{passive}\n\
                 [group.web.backend.a]\naddress = \"10.0.0.11\"\n{port}\n[listener.web]\nvip = \"10.0.0.100\"\n\
                 group = \"web\"\n{listener}\n"
            );
            parse(&text, Path::new("test.toml")).unwrap().groups["web"].passive
        };
        let signs = |passive: Option<Passive>| passive.map(|it| (it.rejected, it.silent, it.counts_requests));
        let (own, tcp, udp) = ("port = 80", "port = 80", "port = 80\nprotocol = \"udp\"");
        assert_eq!(signs(group("", own, tcp)), Some((Some(5), Some(5), true)));
        assert_eq!(signs(group("", own, udp)), Some((Some(5), None, false)));
        assert_eq!(signs(group("", "", "port = \"any\"")), None);
        let written = "[group.web.passive]\nsilent = 9";
        assert_eq!(signs(group(written, own, udp)), Some((Some(5), Some(9), false)));
        let written = "[group.web.passive]\nrejected = 7";
        assert_eq!(
            signs(group(written, "", "port = \"any\"")),
            Some((Some(7), None, true))
        );
        assert_eq!(group("[group.web.passive]\nenabled = false", own, tcp), None);
        let longer = group("[group.web.passive]\nejection_time = \"10m\"", own, tcp).unwrap();
        assert_eq!(longer.max_ejection_time, Duration::from_secs(600));
    }

    #[test]
    fn a_listener_s_protocol_decides_what_else_there_is() {
        let group = |listener: &str, backend: &str| {
            let text = format!(
                "[snat]\nprefixes = [\"100.64.0.0/26\"]\n[interface.eth0]\n[group.web.backend.a]\naddress = \"10.0.0.11\"\n\
                 {backend}\n[listener.web]\nvip = \"10.0.0.100\"\ngroup = \"web\"\n{listener}\n"
            );
            parse(&text, Path::new("test.toml"))
        };
        let probe = |config: &Config| config.groups["web"].health.as_ref().unwrap().probe.clone();

        let icmp = group("protocol = \"icmp\"", "").unwrap();
        let listener = &icmp.listeners["web"];
        assert_eq!((listener.ports, listener.protocol), (Ports::NONE, Protocol::Icmp));
        assert_eq!(listener.idle_timeout, Duration::from_secs(60));
        assert_eq!(probe(&icmp), Probe::Icmp);
        // Beside others a backend may have its port.
        assert!(group("protocol = \"icmp\"", "port = 80").is_ok());

        let sctp = group(
            "protocol = \"sctp\"\nport = 2905\nreset_on_idle = true",
            "port = 2905",
        )
        .unwrap();
        let listener = &sctp.listeners["web"];
        assert_eq!(listener.ports, Ports::one(2905));
        assert!(listener.reset_on_idle);
        assert_eq!(listener.idle_timeout, DEFAULT_IDLE_TIMEOUT);
        assert_eq!(probe(&sctp), Probe::Icmp);

        let wrong = |listener: &str, backend: &str, says: &str| {
            let errors = group(listener, backend).unwrap_err();
            assert!(errors.to_string().contains(says), "{errors}");
        };
        wrong("protocol = \"sctp\"", "port = 2905", "port is missing");
        wrong(
            "protocol = \"icmp\"\nport = 7",
            "",
            "port is not for protocol = \"icmp\"",
        );
        wrong(
            "protocol = \"icmp\"\nhalf_open_timeout = \"9s\"",
            "",
            "ICMP knows idle_timeout only",
        );
        wrong("protocol = \"gre\"", "port = 1", "\"sctp\"");
    }

    #[test]
    fn cookies_and_rates_of_a_listener_are_what_is_written_or_none() {
        let listener = |keys: &str| {
            let text = format!(
                "[snat]\nprefixes = [\"100.64.0.0/26\"]\n[interface.eth0]\n[group.web.backend.a]\naddress = \"10.0.0.11\"\n\
                 port = 80\n[listener.web]\nvip = \"10.0.0.100\"\nport = 80\ngroup = \"web\"\n{keys}\n"
            );
            let listener = parse(&text, Path::new("test.toml")).unwrap().listeners["web"].clone();
            (listener.syn_cookies, listener.source_rate)
        };
        assert_eq!(listener(""), (None, None));
        assert_eq!(listener("syn_cookies = \"off\""), (None, None));
        assert_eq!(listener("syn_cookies = \"always\"").0, Some(SynCookies::Always));
        assert_eq!(listener("syn_cookies = 1").0, Some(SynCookies::Above(1)));
        assert_eq!(
            listener("syn_cookies = 100_000_000").0,
            Some(SynCookies::Above(100_000_000))
        );

        let rate = |keys: &str| listener(keys).1.unwrap();
        let unwritten = SourceRate {
            flows_per_second: 1_000_000,
            burst: 2_000_000,
            prefix_bits_v4: 32,
            prefix_bits_v6: 64,
        };
        assert_eq!(rate("source_rate = 1_000_000"), unwritten);
        let written = SourceRate {
            flows_per_second: 7,
            burst: 7,
            prefix_bits_v4: 1,
            prefix_bits_v6: 128,
        };
        assert_eq!(
            rate("source_rate = 7\nsource_burst = 7\nsource_prefix = 1\nsource_prefix_v6 = 128"),
            written
        );
    }

    const REST: &str = r#"
        [interface.eth0]
        [group.web.backend.web-1]
        address = "10.0.0.11"
        port = 8080
        [listener.web]
        vip = "10.0.0.100"
        port = 80
        group = "web"
    "#;

    fn with(text: &str) -> Result<Config, Errors> {
        parse(&format!("{text}\n{REST}"), Path::new("test.toml"))
    }

    fn pool(prefixes: &str, more: &str) -> SnatPool {
        with(&format!(
            "[agent]\nmax_flows = 1024\n[snat]\nprefixes = {prefixes}\n{more}"
        ))
        .unwrap()
        .snat
    }

    fn range(first: &str, count: u32) -> (IpAddr, u32) {
        (first.parse().unwrap(), count)
    }

    #[test]
    fn what_is_not_written_has_the_documented_default() {
        let config = with(r#"snat.prefixes = ["100.64.0.0/26"]"#).unwrap();
        assert_eq!(
            config.agent,
            Agent {
                metrics_address: "127.0.0.1:9469".parse().unwrap(),
                control_socket: "/run/forwarder/control.sock".into(),
                max_flows: 262_144,
                max_slots: 4_194_304,
                max_persistent_clients: 65_536,
                pin_directory: "/sys/fs/bpf/forwarder".into(),
                on_stop: OnStop::Detach,
                reload_on_change: false,
                mss_clamp: true,
                control_group: None,
                api: None,
            }
        );
        assert_eq!(
            config.interfaces["eth0"],
            Interface {
                mode: XdpMode::Auto,
                redirect: Redirect::Auto
            }
        );
        let group = &config.groups["web"];
        assert_eq!(group.nat, NatMode::Full);
        assert_eq!(group.backends["web-1"].weight, 1);
        assert_eq!(
            group.health,
            Some(HealthCheck {
                probe: Probe::Tcp,
                interval: Duration::from_secs(2),
                timeout: Duration::from_secs(1),
                rise: 2,
                fall: 3,
                jitter_percent: 10,
                port: None,
            })
        );
        let listener = &config.listeners["web"];
        assert_eq!(
            (
                listener.protocol,
                listener.idle_timeout,
                listener.half_open_timeout
            ),
            (Protocol::Tcp, Duration::from_secs(300), Duration::from_secs(75))
        );
        assert!(config.tunnels.is_empty() && config.networks.is_empty());
    }

    #[test]
    fn an_http_check_asks_for_the_root_and_takes_success_and_redirects() {
        let text = "snat.prefixes = [\"100.64.0.0/26\"]\n[group.web.health]\nkind = \"http\"";
        let probe = with(text).unwrap().groups["web"].health.clone().unwrap().probe;
        let expect = vec![StatusRange {
            first: 200,
            last: 399,
        }];
        assert_eq!(
            probe,
            Probe::Http(HttpProbe {
                method: Method::Get,
                path: "/".to_owned(),
                host: None,
                expect,
                body: None
            })
        );
    }

    fn probe_of(health: &str) -> Probe {
        let text = format!("snat.prefixes = [\"100.64.0.0/26\"]\n[group.web.health]\n{health}");
        let config = with(&text).unwrap_or_else(|errors| panic!("{health}: {errors}"));
        config.groups["web"].health.clone().unwrap().probe
    }

    #[test]
    fn every_kind_of_check_is_read() {
        let udp = |send: &[u8], answer: Option<&[u8]>| Probe::Udp {
            send: send.to_vec(),
            answer: answer.map(<[u8]>::to_vec),
        };
        let grpc = |service: &str| Probe::Grpc {
            service: service.to_owned(),
            host: None,
        };
        let command = ["/bin/check", "-f"].map(str::to_owned).to_vec();
        for (health, expected) in [
            ("kind = \"icmp\"", Probe::Icmp),
            ("kind = \"udp\"", udp(b"", None)),
            (
                "kind = \"udp\"\nsend = \"ping\\r\\n\"\nanswer_hex = \"00 ff\"",
                udp(b"ping\r\n", Some(&[0, 255])),
            ),
            ("kind = \"grpc\"", grpc("")),
            ("kind = \"grpc\"\nservice = \"shop.Cart\"", grpc("shop.Cart")),
            (
                "kind = \"command\"\ncommand = [\"/bin/check\", \"-f\"]",
                Probe::Command(command),
            ),
        ] {
            assert_eq!(probe_of(health), expected, "{health}");
        }
    }

    #[test]
    fn certificates_are_looked_at_if_asked_to() {
        let trust = |keys: &str| match probe_of(&format!("kind = \"https\"\n{keys}")) {
            Probe::Https(_, trust) => trust,
            other => panic!("{other:?}"),
        };
        assert_eq!(trust(""), Trust::Anyone);
        assert_eq!(trust("verify = true"), Trust::Host);
        assert_eq!(trust("ca = \"/etc/ca.pem\""), Trust::File("/etc/ca.pem".into()));
    }

    #[test]
    fn a_group_of_udp_listeners_only_is_asked_by_udp() {
        let kind = |listeners: &str| {
            let text = format!(
                "snat.prefixes = [\"100.64.0.0/26\"]\n[interface.eth0]\n[group.dns.backend.ns]\n\
                 address = \"10.0.0.53\"\nport = 53\n{listeners}"
            );
            let config = parse(&text, Path::new("test.toml")).unwrap();
            config.groups["dns"].health.clone().unwrap().probe.kind()
        };
        let listener = |protocol: &str| {
            format!(
                "[listener.{protocol}]\nvip = \"10.0.0.100\"\nport = 53\nprotocol = \"{protocol}\"\ngroup = \"dns\"\n"
            )
        };
        let (tcp, udp) = (listener("tcp"), listener("udp"));
        assert_eq!(kind(&udp), "udp");
        assert_eq!(kind(&format!("{tcp}{udp}")), "tcp");
        assert_eq!(kind(&format!("{udp}[group.dns.health]\nkind = \"tcp\"")), "tcp");
        assert_eq!(
            kind(&format!("{udp}[group.dns.health]\ninterval = \"5s\"")),
            "udp"
        );
    }

    #[test]
    fn a_tunnel_is_checked_if_it_says_how() {
        let text = r#"
            snat.prefixes = ["100.64.0.0/26"]
            [tunnel.a]
            [tunnel.b.health]
            address = "169.254.42.2"
        "#;
        let tunnels = with(text).unwrap().tunnels;
        assert_eq!(tunnels["a"].health, None);
        assert_eq!(
            tunnels["b"].health,
            Some(TunnelCheck {
                address: IpAddr::from([169, 254, 42, 2]),
                check: HealthCheck {
                    probe: Probe::Icmp,
                    interval: Duration::from_secs(1),
                    timeout: Duration::from_secs(1),
                    rise: 2,
                    fall: 3,
                    jitter_percent: 10,
                    port: None,
                }
            })
        );
    }

    #[test]
    fn a_switched_off_check_may_keep_its_numbers() {
        let text = r#"
            snat.prefixes = ["100.64.0.0/26"]
            [group.web.health]
            kind = "none"
            path = "/health"
            interval = "5s"
        "#;
        assert_eq!(with(text).unwrap().groups["web"].health, None);
    }

    #[test]
    fn probes_take_the_first_address_and_traffic_the_others() {
        let pool = pool(r#"["100.64.0.0/29", "10.9.0.0/24"]"#, "");
        assert_eq!(pool.probes, IpAddr::from([100, 64, 0, 1]).into());
        assert_eq!(pool.ranges, [range("100.64.0.2", 5), range("10.9.0.1", 254)]);
    }

    #[test]
    fn small_prefixes_have_no_network_and_no_broadcast_address() {
        let pool = pool(r#"["100.64.0.8/32", "100.64.0.6/31"]"#, "");
        assert_eq!(pool.probes, IpAddr::from([100, 64, 0, 8]).into());
        assert_eq!(pool.ranges, [range("100.64.0.6", 2)]);
    }

    #[test]
    fn a_probe_address_in_the_middle_splits_its_prefix() {
        let pool = pool(r#"["100.64.0.0/28"]"#, r#"probe_address = "100.64.0.7""#);
        assert_eq!(pool.ranges, [range("100.64.0.1", 6), range("100.64.0.8", 7)]);
    }

    #[test]
    fn eight_prefixes_are_eight_runs_when_the_probe_address_is_at_an_end() {
        let prefixes: Vec<String> = (0..8).map(|n| format!("\"100.64.{n}.0/28\"")).collect();
        let prefixes = format!("[{}]", prefixes.join(", "));
        assert_eq!(pool(&prefixes, "").ranges.len(), 8);
        assert_eq!(
            pool(&prefixes, r#"probe_address = "100.64.7.14""#).ranges.len(),
            8
        );
    }

    #[test]
    fn as_many_flows_as_the_pool_has_addresses_and_ports() {
        let text = |flows| format!("snat.prefixes = [\"100.64.0.0/29\"]\nagent.max_flows = {flows}");
        assert!(with(&text(5 * 64_512)).is_ok());
        assert!(with(&text(5 * 64_512 + 1)).is_err());
    }

    #[test]
    fn the_operator_may_allow_any_range_of_backends() {
        let text = r#"
            snat.prefixes = ["100.64.0.0/26"]
            agent.allowed_backend_ranges = ["0.0.0.0/0"]
            [group.public.backend.one]
            address = "203.0.113.1"
            port = 443
        "#;
        assert_eq!(with(text).unwrap().groups.len(), 2);
    }

    #[test]
    fn groups_may_share_a_backend_and_networks_may_touch() {
        let text = r#"
            snat.prefixes = ["100.64.0.0/26", "100.64.0.64/26"]
            [network.a]
            cidrs = ["10.0.0.0/9"]
            [network.b]
            cidrs = ["10.128.0.0/9"]
            [group.other.backend.web-1]
            address = "10.0.0.11"
            port = 8080
        "#;
        assert_eq!(with(text).unwrap().networks.len(), 2);
    }

    #[test]
    fn every_prefix_inside_another_is_found_also_behind_a_nested_one() {
        let text = r#"
            snat.prefixes = ["100.64.0.0/26"]
            [network.a]
            cidrs = ["10.1.0.0/16", "10.200.0.0/16"]
            [network.b]
            cidrs = ["10.0.0.0/8"]
        "#;
        let errors = with(text).unwrap_err().0;
        let what: Vec<&str> = errors.iter().map(|error| error.what.as_str()).collect();
        assert_eq!(
            what,
            [
                "network \"b\": 10.0.0.0/8 overlaps 10.1.0.0/16 of network \"a\" (line 4)",
                "network \"b\": 10.0.0.0/8 overlaps 10.200.0.0/16 of network \"a\" (line 4)",
            ]
        );
    }

    #[test]
    fn a_group_has_at_most_10000_backends() {
        let group = |count: u32| {
            let backends = (0..count).map(|n| {
                let address = Ipv4Addr::from_bits(0x0a01_0000 + n);
                format!("[group.big.backend.n{n}]\naddress = \"{address}\"\nport = 80\n")
            });
            format!(
                "snat.prefixes = [\"100.64.0.0/26\"]\n{}",
                backends.collect::<String>()
            )
        };
        assert!(with(&group(10_000)).is_ok());
        assert!(with(&group(10_001)).is_err());
    }
}
