//! `forwarder doctor`: is this host fit for this configuration, does every path work, and if not, which command
//! helps?

use anstyle::{AnsiColor, Style};

use super::{
    args::{DoctorArgs, OutputFormat},
    ask, output,
    table::{Align, lines},
};
use crate::{
    api::STATUS_PATH,
    config::address::at_port,
    config::{Config, load::load},
    doctor::{
        Question, examine,
        finding::{Finding, Severity},
        report::Report,
    },
    error::{Error, Errors},
};

const TITLE: Style = Style::new().bold();
const BROKEN: Style = AnsiColor::Red.on_default().bold();
const WARNING: Style = AnsiColor::Yellow.on_default().bold();
const WELL: Style = AnsiColor::Green.on_default().bold();

/// Checks and prints what it found.
///
/// # Errors
/// The configuration's; rights are missing; or something was found that breaks traffic.
pub fn doctor(args: &DoctorArgs) -> Result<(), Errors> {
    let file = &args.config.config;
    let config = load(file)?;
    known(&config, args.group.as_deref())?;
    // Without an answer there is no agent to speak of.
    let agent = ask::get(&config.agent.control_socket, STATUS_PATH).ok();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let runtime = runtime.map_err(|error| Error::host(format!("cannot wait for answers: {error}")))?;
    let facts = runtime.block_on(examine(Question {
        // Commands are pasted elsewhere than they were printed.
        file: std::path::absolute(file).unwrap_or_else(|_| file.clone()),
        config,
        agent,
        group: args.group.clone(),
    }))?;
    let report = Report::of(&facts);
    match args.output.output {
        OutputFormat::Text => output::text(&draw(&report))?,
        OutputFormat::Json => output::json(&report)?,
    }
    match report.count(Severity::Broken) {
        0 => Ok(()),
        1 => Err(Error::failed("1 finding breaks traffic").into()),
        count => Err(Error::failed(format!("{count} findings break traffic")).into()),
    }
}

/// The group asked for has to exist.
fn known(config: &Config, group: Option<&str>) -> Result<(), Error> {
    match group {
        Some(group) if !config.groups.contains_key(group) => {
            let names: Vec<_> = config.groups.keys().map(String::as_str).collect();
            Err(Error::usage(format!("backend group \"{group}\" does not exist"))
                .hint(format!("groups of this configuration: {}", names.join(", "))))
        }
        _ => Ok(()),
    }
}

/// The report as text for a terminal.
fn draw(report: &Report) -> String {
    let mut text = vec![verdict(report)];
    for (number, finding) in report.findings.iter().enumerate() {
        text.push(String::new());
        text.extend(draw_finding(number + 1, finding));
    }
    let mut section = |title: &str, lines: Vec<String>| {
        text.push(String::new());
        text.push(format!("{TITLE}{title}{TITLE:#}"));
        text.extend(lines);
    };
    section("Host", vec![host(report)]);
    section("Interfaces", interfaces(report));
    section("Listeners", listeners(report));
    section("Backends", backends(report));
    text.join("\n")
}

fn verdict(report: &Report) -> String {
    let plural = |count: usize, noun: &str| format!("{count} {noun}{}", if count == 1 { "" } else { "s" });
    let (broken, warnings) = (report.count(Severity::Broken), report.count(Severity::Warning));
    let and_warnings = match warnings {
        0 => String::new(),
        count => format!(", {}", plural(count, "warning")),
    };
    match broken {
        0 => format!("{WELL}all well{WELL:#}{and_warnings}"),
        1 => format!("{BROKEN}1 finding breaks traffic{BROKEN:#}{and_warnings}"),
        count => format!(
            "{BROKEN}{} break traffic{BROKEN:#}{and_warnings}; the first is the likeliest cause",
            plural(count, "finding")
        ),
    }
}

fn draw_finding(number: usize, finding: &Finding) -> Vec<String> {
    let (style, severity) = match finding.severity {
        Severity::Broken => (BROKEN, "broken"),
        Severity::Warning => (WARNING, "warning"),
    };
    let mut text = vec![
        format!(
            "{number}. {style}{severity}: {}{style:#} ({})",
            finding.cause, finding.place
        ),
        format!("   {}", finding.what),
    ];
    if !finding.affects.is_empty() {
        text.push(format!("   affects: {}", finding.affects.join(", ")));
    }
    for (index, fix) in finding.fixes.iter().enumerate() {
        if index == 0 || finding.fixes[index - 1].host != fix.host {
            text.push(format!("   on {}:", fix.host));
        }
        text.push(format!("     {}", fix.command));
    }
    text.extend(finding.advice.as_ref().map(|advice| format!("   {advice}")));
    text
}

fn host(report: &Report) -> String {
    let on = |is_on| if is_on { "on" } else { "off" };
    let host = &report.host;
    format!(
        "kernel {}, forwarding {}, BPF JIT {}, agent {}",
        host.kernel,
        on(host.forwarding),
        host.bpf_jit.map_or("unknown", on),
        if host.agent_running {
            "running"
        } else {
            "not running"
        }
    )
}

fn interfaces(report: &Report) -> Vec<String> {
    let columns = [
        ("INTERFACE", Align::Left),
        ("KIND", Align::Left),
        ("STATE", Align::Left),
        ("MTU", Align::Right),
        ("QUEUES", Align::Right),
        ("RP_FILTER", Align::Left),
        ("OFFLOADS", Align::Left),
        ("MODE", Align::Left),
        ("WHY", Align::Left),
    ];
    let row = |interface: &crate::doctor::report::InterfaceReport| {
        let or_dash = |text: Option<String>| text.unwrap_or_else(|| "-".to_owned());
        [
            interface.name.clone(),
            interface.kind.clone(),
            if interface.up { "up" } else { "down" }.to_owned(),
            interface.mtu_bytes.to_string(),
            or_dash(interface.queues.map(|queues| queues.to_string())),
            or_dash(interface.rp_filter.clone()),
            or_dash((!interface.offloads.is_empty()).then(|| interface.offloads.join(","))),
            interface.mode.to_owned(),
            interface.why.clone(),
        ]
    };
    lines(columns, report.interfaces.iter().map(row).collect())
}

fn listeners(report: &Report) -> Vec<String> {
    let columns = [
        ("LISTENER", Align::Left),
        ("ADDRESS", Align::Left),
        ("GROUP", Align::Left),
        ("ON", Align::Left),
    ];
    let row = |listener: &crate::doctor::report::ListenerReport| {
        [
            listener.name.clone(),
            format!("{}/{}", at_port(listener.vip, &listener.port), listener.protocol),
            listener.group.clone(),
            listener
                .interface
                .clone()
                .unwrap_or_else(|| "no network of this host".to_owned()),
        ]
    };
    lines(columns, report.listeners.iter().map(row).collect())
}

fn backends(report: &Report) -> Vec<String> {
    let columns = [
        ("BACKEND", Align::Left),
        ("ADDRESS", Align::Left),
        ("THROUGH", Align::Left),
        ("ROUTER", Align::Left),
        ("AFTER", Align::Right),
        ("ANSWER", Align::Left),
    ];
    let row = |backend: &crate::doctor::report::BackendReport| {
        let slowest = backend.probes.iter().filter_map(|probe| probe.micros).max();
        [
            format!("{}/{}", backend.group, backend.name),
            match backend.port {
                Some(port) => at_port(backend.address, port),
                None => backend.address.to_string(),
            },
            backend.interface.clone().unwrap_or_else(|| "no route".to_owned()),
            backend
                .router
                .map_or_else(|| "-".to_owned(), |router| router.to_string()),
            slowest.map_or_else(
                || "-".to_owned(),
                |micros| format!("{:.1} ms", micros as f64 / 1000.0),
            ),
            backend.answer.clone(),
        ]
    };
    lines(columns, report.backends.iter().map(row).collect())
}

#[cfg(test)]
mod tests {
    use std::net::IpAddr;

    use anstream::adapter::strip_str;

    use super::*;
    use crate::{
        diagnose::fix::{Fix, Host},
        doctor::finding::Cause,
    };

    #[test]
    fn a_command_stands_alone_on_its_line_below_its_machine() {
        let router = Host::Router(IpAddr::from([169, 254, 42, 2]));
        let finding = Finding::broken(Cause::MtuTooSmall, "cen", "large packets get lost")
            .affects(["web/ecs02".to_owned()])
            .fixes([
                Fix::here("ip link set dev cen mtu 1350"),
                Fix::here("systemctl restart forwarder"),
                Fix::new(router, "ip link set dev cen mtu 1350"),
            ])
            .advice("or raise the MTU");
        let text = draw_finding(1, &finding).join("\n");
        assert_eq!(
            strip_str(&text).to_string(),
            "1. broken: mtu-too-small (cen)\n   large packets get lost\n   affects: web/ecs02\n   on this gateway:\n     \
             ip link set dev cen mtu 1350\n     systemctl restart forwarder\n   on router 169.254.42.2:\n     \
             ip link set dev cen mtu 1350\n   or raise the MTU"
        );
    }

    #[test]
    fn a_group_that_does_not_exist_is_a_matter_of_usage() {
        let text = "[snat]\nprefixes = [\"100.64.0.0/26\"]\n[interface.eth0]\n[group.web.backend.a]\n\
                    address = \"10.0.0.9\"\nport = 80\n[listener.web]\nvip = \"10.0.0.100\"\nport = 80\ngroup = \"web\"\n";
        let config = crate::config::load::parse(text, std::path::Path::new("test.toml")).unwrap();
        assert_eq!(known(&config, None), Ok(()));
        assert_eq!(known(&config, Some("web")), Ok(()));
        let error = known(&config, Some("wbe")).unwrap_err();
        assert_eq!(error.exit_code, crate::error::EXIT_USAGE);
        assert!(error.hint.unwrap().ends_with(": web"));
    }
}
