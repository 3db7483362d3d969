//! The one numbered list of outcomes.
//!
//! Every packet ends with exactly one reason, which is counted. Metrics, status and docs are derived from this
//! list. A number is never reused: a retired reason stays, marked as such.

/// What happens to a packet, without the details of `datapath::Verdict`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum VerdictKind {
    /// It leaves straight from the program.
    Send,
    /// It goes up to the stack.
    Pass,
    Drop,
    /// The sender is told: a TCP reset or an ICMP message goes back. Dropped where neither can be sent.
    Refuse,
}

impl VerdictKind {
    /// As metrics, status and docs have it.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Send => "send",
            Self::Pass => "pass",
            Self::Drop => "drop",
            Self::Refuse => "refuse",
        }
    }
}

/// Why a packet got its verdict.
#[repr(transparent)]
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Reason(pub u32);

/// What there is to say about a reason.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Description {
    pub reason: Reason,
    /// Stable name, snake_case: the value of the metrics' `reason` label.
    pub name: &'static str,
    /// What happens to the packet.
    pub verdict: VerdictKind,
    /// One sentence.
    pub text: &'static str,
    /// What an operator may do about it; empty where nothing is wrong.
    pub hint: &'static str,
}

macro_rules! reasons {
    ($($number:literal $constant:ident $name:literal $verdict:ident $text:literal $hint:literal;)*) => {
        impl Reason {
            $(#[doc = $text] pub const $constant: Self = Self($number);)*
        }

        /// All reasons, by number.
        pub const DESCRIPTIONS: &[Description] = &[
            $(Description {
                reason: Reason($number), name: $name, verdict: VerdictKind::$verdict, text: $text, hint: $hint,
            },)*
        ];
    };
}

reasons! {
    0 REQUEST_FORWARDED "request_forwarded" Send
        "A request was rewritten and sent towards its backend." "";
    1 REPLY_FORWARDED "reply_forwarded" Send
        "A reply was rewritten and sent towards its client." "";
    2 REQUEST_TO_STACK "request_to_stack" Pass
        "A request was rewritten and handed to the stack, which routes it: into a tunnel device, or to a neighbour that is not resolved yet." "";
    3 REPLY_TO_STACK "reply_to_stack" Pass
        "A reply was rewritten and handed to the stack, which routes it." "";
    4 ARP_ANSWERED "arp_answered" Send
        "An ARP request for a VIP or an SNAT address was answered." "";
    5 ECHO_ANSWERED "echo_answered" Send
        "An ICMP echo request to a VIP without a listener of ICMP was answered." "";
    6 NOT_IP "not_ip" Pass
        "The frame is neither IP nor a question for the link address of one of our addresses." "";
    7 NOT_OURS "not_ours" Pass
        "No listener, flow or SNAT address has the packet's destination." "";
    8 NO_LISTENER "no_listener" Pass
        "The destination is a VIP, but no listener has this port and protocol." "Add a listener, or ignore it: port scans end here.";
    9 FRAGMENT "fragment" Drop
        "A fragment for one of our addresses, whose packet's first fragment has not passed or belongs to no flow." "Expected when that was refused or lost; else something before the gateway drops or reorders fragments.";
    10 TRUNCATED "truncated" Pass
        "A header is cut short, or a length field claims more than there is." "";
    11 UNSUPPORTED_PROTOCOL "unsupported_protocol" Pass
        "The IP protocol is neither TCP, UDP nor SCTP, or the packet is a fragment of SCTP, or a message of ICMP that is neither about a flow nor an echo of one." "";
    12 NOT_A_SYN "not_a_syn" Drop
        "A packet of TCP or SCTP without a flow to a listener: only a SYN or INIT opens one." "Expected after idle timeouts and restarts; clients will reconnect.";
    13 NO_BACKEND "no_backend" Refuse
        "No backend of the group takes new flows." "See the group's health in `forwarder status`.";
    14 POOL_EXHAUSTED "pool_exhausted" Refuse
        "No SNAT binding is left for a new flow." "Add a prefix to [snat], or shorten idle timeouts.";
    15 FLOW_TABLE_FULL "flow_table_full" Refuse
        "No flow entry is left for a new flow." "Raise agent.max_flows, and the pool with it: each flow holds one address and port.";
    16 FLOW_CONFLICT "flow_conflict" Drop
        "A DNAT flow of another listener already has this client port towards the same backend." "Use full NAT for backends that several listeners share.";
    17 NO_FLOW "no_flow" Drop
        "A packet to an SNAT address belongs to no flow." "Expected for a while after flows end; else look for scans of the pool.";
    18 NO_ROUTE "no_route" Drop
        "The kernel has no usable route to the packet's new destination." "See `ip route get`; the agent's diagnosis names the missing route.";
    19 FORWARDING_DISABLED "forwarding_disabled" Drop
        "The ingress interface does not forward." "sysctl -w net.ipv4.ip_forward=1";
    20 TTL_EXCEEDED "ttl_exceeded" Refuse
        "The packet's time to live ended here." "Expected from traceroute; else look for a routing loop.";
    21 INTERNAL "internal" Drop
        "A table held something impossible." "Please report this with the output of `forwarder status -o json`.";
    22 OWN_SOURCE "own_source" Drop
        "A new flow's source is one of our own addresses, a VIP or an SNAT address: a loop, or a forgery." "Look for a route that sends our packets back to us.";
    23 SOURCE_NOT_ALLOWED "source_not_allowed" Drop
        "The listener admits only some clients, and this is none of them." "Add the client's prefix to the listener's `sources`.";
    24 LISTENER_LIMIT "listener_limit" Refuse
        "The listener has as many flows as it may have." "Raise the listener's `max_flows`.";
    25 BACKEND_LIMIT "backend_limit" Refuse
        "Every backend that could take the flow has as many as it may have." "Raise the backends' `max_flows`, or add backends.";
    26 MARTIAN "martian" Pass
        "An IPv6 packet has an IPv4-mapped address, which is not for the wire (RFC 6890)." "Look for its sender: it is broken, or forges.";
    27 EXTENSION_HEADER "extension_header" Pass
        "An IPv6 packet has a routing header, IPsec, mobility, or more than three headers of options, which are not translated." "Send without them, or to the backend directly.";
    28 NEIGHBOUR_ANSWERED "neighbour_answered" Send
        "An IPv6 neighbour solicitation for a VIP or an SNAT address was answered." "";
    29 TOO_BIG "too_big" Refuse
        "The packet does not fit its way and may not be fragmented; its sender is told the largest size that does." "Nothing, unless it repeats for one sender: then something on its side drops ICMP.";
    30 ICMP_FORWARDED "icmp_forwarded" Send
        "An ICMP error about a packet of a flow was translated and sent on to the end that sent that packet." "";
    31 ICMP_TO_STACK "icmp_to_stack" Pass
        "An ICMP error about a packet of a flow was translated and handed to the stack, which routes it." "";
    32 FRAGMENT_HELD "fragment_held" Drop
        "A fragment came before its packet's first; the agent holds it and sends it on when that has passed." "";
    33 CONGESTION_UNHEARD "congestion_unheard" Drop
        "A packet came out of a tunnel whose network marked congestion, and its sender does not look at such marks (RFC 6040)." "Relieve the network that carries the tunnel.";
    34 TUNNEL_TO_STACK "tunnel_to_stack" Pass
        "A packet inside a native tunnel belongs to no flow yet, or to none of ours: the kernel's device takes it out." "";
    35 UNTRANSLATABLE "untranslatable" Drop
        "A packet of a flow between IPv4 and IPv6 cannot be translated (RFC 7915): an ICMP error that the other family has no equal of, a fragmented datagram without checksum, or more than the agent can cut." "Lower the sender's MTU, or use backends of the clients' family.";
    36 FRAGMENTED "fragmented" Drop
        "A packet from IPv4 that routers may cut is too large as IPv6; the agent sends it in fragments." "Lower the sender's MTU by 28 bytes, as the agent is slower than the data path.";
    37 SYN_COOKIE_SENT "syn_cookie_sent" Send
        "A SYN was answered with a cookie instead of opening a flow, as the listener gets more of them than `syn_cookies` lets through." "Expected in a flood; else raise the listener's `syn_cookies`.";
    38 SYN_COOKIE_INVALID "syn_cookie_invalid" Drop
        "An acknowledgment without a flow to a listener that has sent cookies lately is none of them, or one that is older than two minutes." "Expected in a flood of acknowledgments, and after idle timeouts.";
    39 HANDSHAKE_PENDING "handshake_pending" Drop
        "A packet of a connection that a cookie opened, and whose backend has not answered yet." "Expected now and then; if it repeats for one backend, that does not answer SYNs.";
    40 SOURCE_RATE "source_rate" Drop
        "Clients of one prefix open flows faster than the listener's `source_rate` lets them." "Raise it, or ask the owner of that prefix.";
}

impl Reason {
    /// How many there are: the size of the counter table.
    pub const COUNT: usize = DESCRIPTIONS.len();

    /// Is the sender told? Those whose verdict is [`VerdictKind::Refuse`].
    #[inline(always)]
    pub const fn is_refusal(self) -> bool {
        matches!(
            self,
            Self::NO_BACKEND
                | Self::POOL_EXHAUSTED
                | Self::FLOW_TABLE_FULL
                | Self::LISTENER_LIMIT
                | Self::BACKEND_LIMIT
                | Self::TTL_EXCEEDED
                | Self::TOO_BIG
        )
    }

    /// Was a new flow refused?
    #[inline(always)]
    pub const fn is_flow_refusal(self) -> bool {
        self.is_refusal() && !matches!(self, Self::TTL_EXCEEDED | Self::TOO_BIG)
    }

    /// The entry of the list; `None` for a number this build does not know.
    pub fn description(self) -> Option<&'static Description> {
        DESCRIPTIONS.get(self.0 as usize)
    }
}

impl core::fmt::Debug for Reason {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        match self.description() {
            Some(description) => f.write_str(description.name),
            None => write!(f, "reason {}", self.0),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_positions_and_names_are_unique() {
        for (position, description) in DESCRIPTIONS.iter().enumerate() {
            assert_eq!(description.reason.0 as usize, position, "{}", description.name);
            let same = DESCRIPTIONS
                .iter()
                .filter(|other| other.name == description.name)
                .count();
            assert_eq!(same, 1, "{}", description.name);
            assert!(description.text.ends_with('.'), "{}", description.name);
            let is_refuse = description.verdict == VerdictKind::Refuse;
            assert_eq!(description.reason.is_refusal(), is_refuse, "{}", description.name);
        }
    }
}
