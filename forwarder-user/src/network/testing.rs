//! Private network namespaces for this module's tests: each test runs in one of its own, which ends with it.

use std::{fs, process::Command, thread, time::Duration};

use nix::sched::{CloneFlags, unshare};

/// Runs `test` on a thread of its own in a new network namespace, for at most 20 s. Without root it says
/// `SKIP: needs root` and returns, or fails where `FORWARDER_TESTS_STRICT` is 1.
pub(super) fn in_namespace(test: impl Future<Output = ()> + Send + 'static) {
    if !nix::unistd::geteuid().is_root() {
        assert_ne!(
            std::env::var("FORWARDER_TESTS_STRICT").as_deref(),
            Ok("1"),
            "needs root"
        );
        eprintln!("SKIP: needs root");
        return;
    }
    let outcome = thread::spawn(move || {
        unshare(CloneFlags::CLONE_NEWNET).expect("a new network namespace");
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap();
        runtime
            .block_on(async { tokio::time::timeout(Duration::from_secs(20), test).await })
            .expect("the test must end within 20 s");
    })
    .join();
    if let Err(panic) = outcome {
        std::panic::resume_unwind(panic);
    }
}

/// Runs `ip <arguments>` in the calling thread's namespace.
pub(super) fn ip(arguments: &str) {
    let output = Command::new("ip")
        .args(arguments.split(' '))
        .output()
        .expect("the command ip");
    assert!(
        output.status.success(),
        "ip {arguments}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
}

/// Writes `/proc/sys/net/ipv4/<name>` of the calling thread's namespace.
pub(super) fn set_sysctl(name: &str, value: &str) {
    fs::write(format!("/proc/sys/net/ipv4/{name}"), value).unwrap();
}

/// A veth called `name` with address `own` whose other end, `<name>-peer`, answers ARP for `peers`. Both ends are in
/// this namespace, so the far end has to accept our own address as a sender.
pub(super) fn veth_with_answering_peer(name: &'static str, own: &str, peers: &str) -> &'static str {
    let peer = format!("{name}-peer");
    ip(&format!("link add {name} type veth peer name {peer}"));
    ip(&format!("link set {name} up"));
    ip(&format!("link set {peer} up"));
    ip(&format!("address add {own} dev {name}"));
    ip(&format!("address add {peers} dev {peer}"));
    set_sysctl(&format!("conf/{peer}/accept_local"), "1");
    name
}
