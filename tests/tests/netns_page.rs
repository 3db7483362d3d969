//! Ring 3: the status page in a real browser, from a real agent. `--test-threads=1`, as the other labs.

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use forwarder_tests::lab::{
    self, Lifetime,
    agent::{self, METRICS_ADDRESS, ShowLog},
    browser::{self, Browser, Screen},
    topology::{Extras, Site},
    wait_until,
};
use serde_json::{Value, json};

/// Patience with slow machines; nothing takes so long.
const DEADLINE: Duration = Duration::from_secs(60);
const DESK: Screen = Screen {
    width: 1280,
    is_dark: false,
    is_phone: false,
};
const PHONE: Screen = Screen {
    width: 390,
    is_dark: true,
    is_phone: true,
};

/// What is in a cell of a backend's row.
fn cell(browser: &mut Browser, backend: &str, field: &str) -> Result<String> {
    let text = browser.evaluate(&format!(
        "document.querySelector('#backends [data-key=\"{backend}\"] [data-field={field}]')?.textContent"
    ))?;
    Ok(text
        .as_str()
        .with_context(|| format!("no {field} of {backend}"))?
        .to_owned())
}

#[test]
fn the_page_shows_the_api_s_numbers_and_follows_them() -> Result<()> {
    if !lab::can_run_test(browser::missing().map(|missing| Err(anyhow::Error::msg(missing))))
        || !lab::can_run_test(Some(agent::binary()))
    {
        return Ok(());
    }
    let mut site = Site::cross_region(Lifetime::Process, Extras::default())?;
    let show_log = ShowLog::of(&site.lab);
    let agent = site.start_agent(&site.web_configuration(), "web")?;
    for _ in 0..5 {
        site.curl()?;
    }

    let mut browser = Browser::start(&site.lab, &site.gateway)?;
    browser.show_on(DESK)?;
    browser.open(&format!("http://{METRICS_ADDRESS}/"))?;
    wait_until(
        "the page's and the API's numbers to be the same",
        DEADLINE,
        || {
            let status = agent.status()?;
            ensure!(browser.evaluate("document.getElementById('live').textContent")? == "live");
            ensure!(
                browser.evaluate("document.getElementById('version').textContent")? == json!(status.version)
            );
            let group = &status.groups[0];
            for backend in &group.backends {
                let key = format!("web/{}", backend.name);
                let address = match &backend.tunnel {
                    Some(tunnel) => format!("{} via {tunnel}", backend.endpoint()),
                    None => backend.endpoint(),
                };
                ensure!(cell(&mut browser, &key, "address")? == address);
                ensure!(cell(&mut browser, &key, "flows")? == backend.traffic.flows.to_string());
                ensure!(cell(&mut browser, &key, "health")?.starts_with(&backend.health));
            }
            for reason in &status.reasons {
                let shown = browser.evaluate(&format!(
                "document.querySelector('#drops [data-key={}] [data-field=packets]')?.textContent ?? null",
                reason.name
            ))?;
                let is_shown = ["drop", "refuse"].contains(&reason.verdict.as_str()) && reason.packets > 0;
                let expected = if is_shown {
                    json!(reason.packets.to_string())
                } else {
                    Value::Null
                };
                ensure!(shown == expected, "{}: {shown}, not {expected}", reason.name);
            }
            Ok(())
        },
    )?;
    // Every part of the topology, and lines between them: client, listener, group, two backends, the tunnel.
    let nodes =
        browser.evaluate("[...document.querySelectorAll('.node')].map((node) => node.dataset.node)")?;
    ensure!(
        nodes
            == json!([
                "clients",
                "listener web",
                "group web",
                "backend web/ecs01",
                "backend web/ecs02",
                "tunnel cen"
            ]),
        "{nodes}"
    );
    ensure!(browser.evaluate("document.querySelectorAll('.edges path').length")? == 5);

    // A backend fails, and the page that is open shows it, with the reason, on itself.
    browser.evaluate("window.wasHereBefore = true")?;
    site.kill_nginx("ecs02")?;
    wait_until("the failure to be on the page", DEADLINE, || {
        let health = cell(&mut browser, "web/ecs02", "health")?;
        ensure!(
            health.starts_with("unhealthy") && health.len() > "unhealthy".len() + 10,
            "{health}"
        );
        let node =
            browser.evaluate("document.querySelector('[data-node=\"backend web/ecs02\"]').dataset.state")?;
        ensure!(node == "unhealthy", "{node}");
        ensure!(cell(&mut browser, "web/ecs02", "share")? == "0 %");
        ensure!(cell(&mut browser, "web/ecs01", "health")?.starts_with("healthy"));
        Ok(())
    })?;
    ensure!(
        browser.evaluate("window.wasHereBefore")? == true,
        "it was loaded anew"
    );

    // Commands in hints are shown as such, and nothing else is markup.
    for (told, shown) in [
        (
            "run `ip link` and `ss -t`.",
            "run <code>ip link</code> and <code>ss -t</code>.",
        ),
        ("no command", "no command"),
        ("a ` alone", "a ` alone"),
        ("`<b>`", "<code>&lt;b&gt;</code>"),
        ("`a` and `b", "<code>a</code> and `b"),
    ] {
        let html = browser.evaluate(&format!(
            "(() => {{ const p = document.createElement('p'); tell(p, {}); return p.innerHTML; }})()",
            json!(told)
        ))?;
        ensure!(html == shown, "{told}: {html}");
    }
    let text = browser.evaluate("document.body.innerText")?;
    ensure!(!text.as_str().context("a page has text")?.contains('`'), "{text}");

    // A phone: nothing is wider than its screen.
    browser.show_on(PHONE)?;
    wait_until("the page to fit a phone", DEADLINE, || {
        let width = browser.evaluate("document.documentElement.scrollWidth")?;
        ensure!(width == PHONE.width, "{width} pixels");
        Ok(())
    })?;

    // The agent ends: what is shown is marked as old.
    agent.stop()?;
    wait_until("the page to tell that the agent is gone", DEADLINE, || {
        let said = browser.evaluate("document.getElementById('live').className")?;
        ensure!(said == "bad", "{said}");
        Ok(())
    })?;
    // That the agent could not be reached is noted by the browser, and nothing else.
    let others: Vec<_> = browser
        .complaints()
        .iter()
        .filter(|complaint| !complaint.contains("ERR_CONNECTION"))
        .collect();
    ensure!(others.is_empty(), "{others:?}");
    show_log.all_is_well();
    Ok(())
}
