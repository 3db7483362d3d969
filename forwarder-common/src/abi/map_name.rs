//! Names of the maps, for both sides. The kernel keeps 15 bytes of a name.

/// Array of one `Settings`.
pub const SETTINGS: &str = "SETTINGS";
/// Hash from `ListenerKey` to `Listener`.
pub const LISTENERS: &str = "LISTENERS";
/// Trie from `ListenerRangeKey` to `Listener`.
pub const LISTENER_RANGES: &str = "LISTENER_RANGES";
/// Trie from `SourceKey` to `Source`.
pub const SOURCES: &str = "SOURCES";
/// Hash from `VipKey` to `Vip`.
pub const VIPS: &str = "VIPS";
/// Array of `BackendGroup`.
pub const GROUPS: &str = "GROUPS";
/// Array of `BackendId`: all Maglev tables.
pub const SLOTS: &str = "SLOTS";
/// Array of `u64` by `GroupId`: the turns taken so far of groups that select in turn.
pub const GROUP_TURNS: &str = "GROUP_TURNS";
/// LRU hash from `PersistenceKey` to `Persistence`.
pub const PERSISTENCE: &str = "PERSISTENCE";
/// Array of `Backend`.
pub const BACKENDS: &str = "BACKENDS";
/// Hash from `FlowKeyV4` to `FlowReference`.
pub const FLOW_INDEX: &str = "FLOW_INDEX";
/// Hash from `FlowKey` to `FlowReference`, for IPv6.
pub const FLOW_INDEX_V6: &str = "FLOW_INDEX_V6";
/// Array of `datapath::hint::Hints`.
pub const FLOW_HINTS: &str = "FLOW_HINTS";
/// Number of the last of them, which the programs know when they are loaded.
pub const LAST_HINTS: &str = "LAST_HINTS";
/// Array of `FlowEntry`, mapped into the agent's memory.
pub const FLOWS: &str = "FLOWS";
/// Queue of free `FlowId`; the agent fills it with all there are.
pub const FREE_FLOWS: &str = "FREE_FLOWS";
/// Hash from `InterfaceKey` to `Interface`.
pub const INTERFACES: &str = "INTERFACES";
/// Array of `TunnelPort` by UDP port.
pub const TUNNEL_PORTS: &str = "TUNNEL_PORTS";
/// Hash from `TunnelEndpointKey` to `TunnelEndpoint`.
pub const TUNNEL_ENDPOINTS: &str = "TUNNEL_ENDPOINT";
/// Hash from `TunnelHopKey` to `TunnelHop`.
pub const TUNNEL_HOPS: &str = "TUNNEL_HOPS";
/// Array of `TunnelPeer` by `PeerId`.
pub const TUNNEL_PEERS: &str = "TUNNEL_PEERS";
/// Array of `u64` by `ListenerId`: flows that count against the limit now; mapped into the agent's memory.
pub const LISTENER_LIVE: &str = "LISTENER_LIVE";
/// The same by `BackendId`.
pub const BACKEND_LIVE: &str = "BACKEND_LIVE";
/// Array of `CarriedCounters` by CPU and `ListenerId`: first those of CPU 0. Mapped into the agent's memory.
///
/// Of a per-CPU array the kernel keeps a pointer for each entry, which misses the cache as often as the entry does.
pub const LISTENER_CARRIED: &str = "LISTENER_CARRY";
/// The same by `BackendId`.
pub const BACKEND_CARRIED: &str = "BACKEND_CARRY";
/// How many listeners each CPU has in it, which the programs know when they are loaded.
pub const LISTENERS_PER_CPU: &str = "LISTENERS_A_CPU";
/// The same of backends.
pub const BACKENDS_PER_CPU: &str = "BACKENDS_A_CPU";
/// Per-CPU array of `EventCounters` by `ListenerId`.
pub const LISTENER_EVENTS: &str = "LISTENER_EVENTS";
/// Per-CPU array of `EventCounters` by `BackendId`.
pub const BACKEND_EVENTS: &str = "BACKEND_EVENTS";
/// Per-CPU array of `BackendHop` by `BackendId`.
pub const BACKEND_HOPS: &str = "BACKEND_HOPS";
/// Per-CPU array of one `datapath::Walk`: what stages hand on.
pub const WALK: &str = "WALK";
/// LRU hash from `FragmentKey` to `FragmentFlow`.
pub const FRAGMENTS: &str = "FRAGMENTS";
/// Ring buffer of `HeldPacket`.
pub const HELD: &str = "HELD";
/// Array of one `CaptureFilter`.
pub const CAPTURE_FILTER: &str = "CAPTURE_FILTER";
/// Per-CPU array of one `CaptureRoom`.
pub const CAPTURE_ROOM: &str = "CAPTURE_ROOM";
/// Ring buffer of `CapturedPacket`.
pub const CAPTURED: &str = "CAPTURED";
/// Per-CPU array of one `IcmpBudget`.
pub const ICMP_BUDGET: &str = "ICMP_BUDGET";
/// Per-CPU array of `SynBudget` by `ListenerId`.
pub const SYN_BUDGETS: &str = "SYN_BUDGETS";
/// Array of `Handshake` by `FlowId`.
pub const HANDSHAKES: &str = "HANDSHAKES";
/// LRU hash from `SourceRateKey` to `SourceRate`.
pub const SOURCE_RATES: &str = "SOURCE_RATES";
/// Per-CPU array of `ReasonCounters` by `Reason`.
pub const REASON_COUNTERS: &str = "REASON_COUNT";

/// XDP program for interfaces in native mode.
pub const PROGRAM_XDP: &str = "forwarder_xdp";
/// XDP program for interfaces in generic mode.
pub const PROGRAM_XDP_GENERIC: &str = "forwarder_skb";
/// tcx program for the ingress of tunnel devices.
pub const PROGRAM_TUNNEL: &str = "forwarder_tunnel";
/// XDP program that answers the agent's questions (`datapath::inquiry`) in test runs; attached nowhere.
pub const PROGRAM_ASK: &str = "forwarder_ask";
