//! Breaks each of the three things that a remote backend needs, on real links, and expects to be told which.
//!
//! ```text
//!  gateway ---------- vx-peer (VXLAN) ---------- transit ------------- server
//!  100.64.0.1 (pool)  10.255.0.1   10.255.0.2    192.168.1.1           192.168.1.10:8080
//! ```
//!
//! Three network namespaces of their own, entered by threads; nothing leaves them. Needs root, `ip` and `nft`.

#![expect(
    clippy::unwrap_used,
    reason = "clippy.toml exempts test functions, but not what they call"
)]

use std::{
    fs::{self, File},
    io::Write as _,
    net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener},
    process::{Command, Stdio},
    thread,
    time::Duration,
};

use forwarder_user::{
    diagnose::{Cause, Depth, Diagnosis, Subject, diagnose},
    health::{Origin, ProbeFailure, tcp},
    network::Network,
};
use nix::sched::{CloneFlags, setns};

const POOL: &str = "100.64.0.0/26";
const PROBE: IpAddr = IpAddr::V4(Ipv4Addr::new(100, 64, 0, 1));
const SERVER: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::new(192, 168, 1, 10)), 8080);
const TIMEOUT: Duration = Duration::from_millis(500);

/// The inbound rule of a server that admits its own network and the pool's superset, as cloud users write it.
const ADMITTING: &str = "
flush ruleset
table inet server {
  chain inbound {
    type filter hook input priority 0; policy drop;
    ct state established,related accept
    ip saddr 192.168.0.0/16 accept
    ip saddr 100.64.0.0/10 accept
  }
}";

/// Three namespaces; they go when this is dropped.
struct Lab {
    gateway: String,
    transit: String,
    server: String,
}

impl Drop for Lab {
    fn drop(&mut self) {
        for name in [&self.gateway, &self.transit, &self.server] {
            let _ = Command::new("ip")
                .args(["netns", "delete", name])
                .stderr(Stdio::null())
                .status();
        }
    }
}

impl Lab {
    fn new(test: &str) -> Self {
        let name = |role: &str| format!("diagnose-{}-{test}-{role}", std::process::id());
        let lab = Self {
            gateway: name("gw"),
            transit: name("tr"),
            server: name("srv"),
        };
        for name in [&lab.gateway, &lab.transit, &lab.server] {
            run("ip", &["netns", "add", name], "");
            ip(name, "link set lo up");
        }
        ip(
            &lab.gateway,
            &format!("link add under type veth peer name under netns {}", lab.transit),
        );
        ip(
            &lab.transit,
            &format!("link add inside type veth peer name eth0 netns {}", lab.server),
        );
        for (namespace, own, far) in [(&lab.gateway, 1, 2), (&lab.transit, 2, 1)] {
            ip(namespace, &format!("address add 172.31.0.{own}/30 dev under"));
            ip(namespace, "link set under up");
            ip(
                namespace,
                &format!(
                    "link add vx-peer type vxlan id 42 local 172.31.0.{own} remote 172.31.0.{far} dstport 4789"
                ),
            );
            ip(namespace, &format!("address add 10.255.0.{own}/30 dev vx-peer"));
            ip(namespace, "link set vx-peer up");
        }
        ip(
            &lab.gateway,
            "route add 192.168.0.0/16 via 10.255.0.2 dev vx-peer",
        );
        ip(&lab.transit, &format!("route add {POOL} via 10.255.0.1"));
        ip(&lab.transit, "address add 192.168.1.1/24 dev inside");
        ip(&lab.transit, "link set inside up");
        ip(&lab.server, "address add 192.168.1.10/24 dev eth0");
        ip(&lab.server, "link set eth0 up");
        ip(&lab.server, "route add default via 192.168.1.1");
        inside(&lab.transit, || {
            fs::write("/proc/sys/net/ipv4/ip_forward", "1").unwrap();
        });
        lab.filter(ADMITTING);
        lab
    }

    /// Replaces the server's firewall.
    fn filter(&self, rules: &str) {
        run(
            "nsenter",
            &[&format!("--net=/run/netns/{}", self.server), "nft", "-f", "-"],
            rules,
        );
    }
}

/// Runs `ip -n <namespace> <arguments>`.
fn ip(namespace: &str, arguments: &str) {
    let arguments: Vec<&str> = ["-n", namespace]
        .into_iter()
        .chain(arguments.split(' '))
        .collect();
    run("ip", &arguments, "");
}

fn run(program: &str, arguments: &[&str], input: &str) {
    let mut child = Command::new(program)
        .args(arguments)
        .stdin(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap_or_else(|error| panic!("{program}: {error}"));
    child.stdin.take().unwrap().write_all(input.as_bytes()).unwrap();
    let output = child.wait_with_output().unwrap();
    let complaint = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{program} {arguments:?}: {complaint}");
}

/// Runs `work` on a thread inside a namespace. What it opens stays there.
fn inside<T: Send>(namespace: &str, work: impl FnOnce() -> T + Send) -> T {
    thread::scope(|scope| {
        let thread = scope.spawn(|| {
            let file = File::open(format!("/run/netns/{namespace}")).unwrap();
            setns(file, CloneFlags::CLONE_NEWNET).unwrap();
            work()
        });
        thread
            .join()
            .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

/// Runs `test` in the gateway, with the probe address in place and a server that listens.
fn in_lab(name: &str, test: impl AsyncFnOnce(&Lab, &Network) + Send) {
    if !nix::unistd::geteuid().is_root() {
        assert_ne!(
            std::env::var("FORWARDER_TESTS_STRICT").as_deref(),
            Ok("1"),
            "needs root"
        );
        eprintln!("SKIP: needs root");
        return;
    }
    let lab = Lab::new(name);
    // Accepting is the kernel's work: the handshake completes without this process.
    let _listener = inside(&lab.server, || TcpListener::bind(SERVER).unwrap());
    inside(&lab.gateway, || {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap();
        runtime.block_on(async {
            let network = Network::open().unwrap();
            assert!(network.add_address("lo", PROBE).await.unwrap());
            expect_answer().await;
            test(&lab, &network).await;
        });
    });
}

async fn expect_answer() {
    // The first packets of a new link wait for ARP on three links.
    let generous = Duration::from_secs(5);
    tcp::probe(SERVER, &Origin::Address(PROBE), generous)
        .await
        .expect("the sound path must work");
}

async fn explain(network: &Network) -> (ProbeFailure, Diagnosis) {
    // One second is the promise; the machine that tests may be busy.
    explain_within(Duration::from_secs(3), network, Depth::Quick).await
}

async fn explain_within(bound: Duration, network: &Network, depth: Depth) -> (ProbeFailure, Diagnosis) {
    let failure = tcp::probe(SERVER, &Origin::Address(PROBE), TIMEOUT)
        .await
        .expect_err("the broken path must fail");
    let subject = Subject {
        backend: SERVER,
        probe_source: PROBE,
        snat_prefixes: vec![POOL.parse().unwrap()],
        remote: Some(("192.168.0.0/16".parse().unwrap(), Some("vx-peer".into()))),
    };
    let begin = std::time::Instant::now();
    let diagnosis = diagnose(network, &subject, &failure, depth).await;
    assert!(begin.elapsed() < bound, "{:?}", begin.elapsed());
    (failure, diagnosis)
}

#[track_caller]
fn assert_diagnosis((failure, diagnosis): &(ProbeFailure, Diagnosis), cause: Cause, hint: &str) {
    assert_eq!(diagnosis.cause, cause, "{failure:?}: {diagnosis:?}");
    let given = diagnosis.hint.as_deref().unwrap_or_default();
    assert!(given.contains(hint), "{hint:?} is not in {given:?}");
}

#[test]
fn the_missing_one_of_the_three_is_named() {
    in_lab("three", async |lab, network| {
        // The route to the remote network, here; the hint is the command that was undone.
        let route = "192.168.0.0/16 via 10.255.0.2 dev vx-peer";
        ip(&lab.gateway, &format!("route delete {route}"));
        assert_diagnosis(
            &explain(network).await,
            Cause::NoRoute,
            &format!("`ip route replace {route}`"),
        );
        ip(&lab.gateway, &format!("route add {route}"));
        expect_answer().await;

        // The back-to-origin route, on the transit router.
        let back = format!("{POOL} via 10.255.0.1");
        ip(&lab.transit, &format!("route delete {back}"));
        let hint = format!("on 10.255.0.2: `ip route replace {back}`");
        assert_diagnosis(&explain(network).await, Cause::NoReturnRoute, &hint);
        ip(&lab.transit, &format!("route add {back}"));
        expect_answer().await;

        // The inbound rule, on the server.
        lab.filter(&ADMITTING.replace("ip saddr 100.64.0.0/10 accept", ""));
        assert_diagnosis(
            &explain(network).await,
            Cause::Filtered,
            "admit 100.64.0.0/26 in the server's inbound rule",
        );
        lab.filter(ADMITTING);
        expect_answer().await;
    });
}

#[test]
fn other_faults_on_the_path_are_told_apart() {
    in_lab("other", async |lab, network| {
        // A default route does not hide the missing one.
        let route = "192.168.0.0/16 via 10.255.0.2 dev vx-peer";
        ip(&lab.gateway, &format!("route delete {route}"));
        ip(&lab.gateway, "link add wan type veth peer name internet");
        ip(&lab.gateway, "link set wan up");
        ip(&lab.gateway, "link set internet up");
        ip(&lab.gateway, "address add 172.31.1.1/24 dev wan");
        ip(&lab.gateway, "route add default via 172.31.1.2");
        let said = explain(network).await;
        assert_diagnosis(&said, Cause::NoRoute, &format!("ip route replace {route}"));
        assert!(said.1.text.contains("leave through wan"), "{}", said.1.text);
        ip(&lab.gateway, "route delete default");
        ip(&lab.gateway, "route add blackhole 192.168.0.0/16");
        assert_diagnosis(
            &explain(network).await,
            Cause::Blackholed,
            "ip route get 192.168.1.10",
        );
        ip(&lab.gateway, "route delete blackhole 192.168.0.0/16");
        ip(&lab.gateway, &format!("route add {route}"));
        expect_answer().await;

        // The server admits the pool, but not to the port.
        lab.filter(&ADMITTING.replace(
            "ip saddr 100.64.0.0/10 accept",
            "ip saddr 100.64.0.0/10 icmp type echo-request accept",
        ));
        assert_diagnosis(&explain(network).await, Cause::PortFiltered, "TCP port 8080");
        // A rule that rejects instead of dropping says so.
        lab.filter(&ADMITTING.replace(
            "ip saddr 100.64.0.0/10 accept",
            "ip saddr 100.64.0.0/10 reject with icmp admin-prohibited",
        ));
        assert_diagnosis(&explain(network).await, Cause::Rejected, "admit 100.64.0.0/26");
        lab.filter(ADMITTING);

        // The router knows no way on.
        ip(&lab.transit, "route add unreachable 192.168.1.10/32");
        let said = explain(network).await;
        assert_eq!(said.1.cause, Cause::ServerDown, "{said:?}");
        ip(&lab.transit, "route delete unreachable 192.168.1.10/32");
        expect_answer().await;

        // The server's host is gone, for which its router looks for three seconds.
        ip(&lab.server, "link set eth0 down");
        ip(&lab.transit, "neigh flush dev inside");
        let bound = Duration::from_secs(7);
        let said = explain_within(bound, network, Depth::Thorough).await;
        assert_diagnosis(&said, Cause::ServerDown, "start 192.168.1.10");
        ip(&lab.server, "link set eth0 up");
        ip(&lab.server, "route add default via 192.168.1.1");
        expect_answer().await;

        // The far end of the tunnel goes down: first the neighbour is still believed in, then it is not.
        ip(&lab.transit, "link set vx-peer down");
        let said = explain(network).await;
        assert!(
            matches!(said.1.cause, Cause::NextHopSilent | Cause::NoNeighbour),
            "{said:?}"
        );
        ip(&lab.gateway, "neigh flush dev vx-peer");
        assert_diagnosis(&explain(network).await, Cause::NoNeighbour, "far end of vx-peer");

        ip(&lab.gateway, "link set vx-peer down");
        assert_diagnosis(
            &explain(network).await,
            Cause::TunnelDown,
            "`ip link set vx-peer up`",
        );
        ip(&lab.gateway, "link delete vx-peer");
        let said = explain(network).await;
        assert_eq!(said.1.text, "the tunnel interface vx-peer does not exist");
    });
}
