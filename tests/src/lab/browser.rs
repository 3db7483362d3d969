//! A browser without a window, in a namespace of a lab: loads a page, runs script in it, takes pictures.
//!
//! It is Chromium, told what to do by the DevTools protocol over two pipes (`--remote-debugging-pipe`: messages end
//! with a zero byte, <https://chromedevtools.github.io/devtools-protocol/>). What a page complains about (an exception, a
//! file that its content policy forbids) is kept, so that a test can ask that there be nothing.

use std::{
    fs::{self, File, OpenOptions},
    io::{Read as _, Write as _},
    os::fd::AsFd as _,
    path::Path,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use base64::{Engine as _, prelude::BASE64_STANDARD};
use nix::{
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::{signal::Signal, stat::Mode},
    unistd::mkfifo,
};
use serde_json::{Value, json};

use super::{Lab, Namespace, Process, Service, find, tail, wait_until};

/// Debian's name of the program; other systems have the second.
const PROGRAMS: [&str; 2] = ["chromium", "chromium-browser"];
/// How long the browser may take to answer; its start is the slowest.
const PATIENCE: Duration = Duration::from_secs(60);

/// What the browser pretends to be shown on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Screen {
    /// In CSS pixels; the page is as high as it is.
    pub width: u32,
    pub is_dark: bool,
    pub is_phone: bool,
}

/// A running browser with one page.
#[derive(Debug)]
pub struct Browser {
    process: Process,
    requests: File,
    answers: File,
    /// What has come and is no whole message yet.
    pending: Vec<u8>,
    last_id: u64,
    session: Option<String>,
    complaints: Vec<String>,
}

/// Whether a browser is installed; the hint if not.
pub fn missing() -> Option<String> {
    let found = PROGRAMS.iter().any(|program| find(program).is_some());
    (!found).then(|| "the program `chromium` (Debian: apt-get install chromium)".to_owned())
}

impl Browser {
    /// Starts one in `namespace`; it ends with the lab.
    pub fn start(lab: &Lab, namespace: &Namespace) -> Result<Self> {
        let program = PROGRAMS.iter().find_map(|program| find(program));
        let program = program.context("no chromium is installed")?;
        let directory = lab.directory().join("browser");
        fs::create_dir_all(&directory)?;
        let (to, from, log) = (
            directory.join("to"),
            directory.join("from"),
            directory.join("log"),
        );
        // Opened for both directions, so that opening waits for nobody.
        let pipe = |path: &Path| -> Result<File> {
            mkfifo(path, Mode::S_IRUSR | Mode::S_IWUSR)?;
            Ok(OpenOptions::new().read(true).write(true).open(path)?)
        };
        let (requests, answers) = (pipe(&to)?, pipe(&from)?);
        // The shell only gives the pipes their numbers, 3 and 4, and becomes the browser.
        let start = format!(
            "exec {} --headless=new --no-sandbox --disable-gpu --hide-scrollbars --no-first-run \
             --disable-background-networking --disable-component-update --disable-sync --disable-extensions \
             --remote-debugging-pipe --user-data-dir={}/profile about:blank 3<{} 4>{}",
            program.display(),
            directory.display(),
            to.display(),
            from.display()
        );
        let service = Service {
            name: "the browser",
            program: Path::new("/bin/sh"),
            arguments: &["-c".as_ref(), start.as_ref()],
            environment: &[("HOME", directory.as_os_str())],
            stop_signal: Signal::SIGTERM,
            log: &log,
        };
        let mut browser = Self {
            process: lab.spawn(namespace, &service)?,
            requests,
            answers,
            pending: Vec::new(),
            last_id: 0,
            session: None,
            complaints: Vec::new(),
        };
        let target = browser.call("Target.createTarget", &json!({"url": "about:blank"}))?;
        let attach = json!({"targetId": target["targetId"], "flatten": true});
        let session = browser.call("Target.attachToTarget", &attach)?;
        browser.session = session["sessionId"].as_str().map(str::to_owned);
        ensure!(browser.session.is_some(), "no session: {session}");
        for domain in ["Page.enable", "Runtime.enable", "Log.enable"] {
            browser.call(domain, &json!({}))?;
        }
        Ok(browser)
    }

    /// Takes another screen.
    pub fn show_on(&mut self, screen: Screen) -> Result<()> {
        let scheme = if screen.is_dark { "dark" } else { "light" };
        self.call(
            "Emulation.setEmulatedMedia",
            &json!({"features": [{"name": "prefers-color-scheme", "value": scheme}]}),
        )?;
        self.call(
            "Emulation.setDeviceMetricsOverride",
            &json!({"width": screen.width, "height": 900, "deviceScaleFactor": 1.5, "mobile": screen.is_phone}),
        )?;
        Ok(())
    }

    /// Loads a page.
    pub fn open(&mut self, url: &str) -> Result<()> {
        let answer = self.call("Page.navigate", &json!({"url": url}))?;
        ensure!(answer["errorText"].is_null(), "{url}: {}", answer["errorText"]);
        wait_until("the page to be loaded", PATIENCE, || {
            let state = self.evaluate("document.readyState + ' ' + location.href")?;
            ensure!(state == json!(format!("complete {url}")), "{state}");
            Ok(())
        })?;
        Ok(())
    }

    /// The value of a script's expression in the page.
    pub fn evaluate(&mut self, script: &str) -> Result<Value> {
        let answer = self.call(
            "Runtime.evaluate",
            &json!({"expression": script, "returnByValue": true, "awaitPromise": true}),
        )?;
        ensure!(
            answer["exceptionDetails"].is_null(),
            "{script}: {}",
            answer["exceptionDetails"]["exception"]["description"]
        );
        Ok(answer["result"]["value"].clone())
    }

    /// A picture of the whole page, as PNG.
    pub fn picture(&mut self) -> Result<Vec<u8>> {
        let answer = self.call(
            "Page.captureScreenshot",
            &json!({"format": "png", "captureBeyondViewport": true}),
        )?;
        let data = answer["data"].as_str().context("a picture has data")?;
        Ok(BASE64_STANDARD.decode(data)?)
    }

    /// What the pages have complained about so far.
    pub fn complaints(&self) -> &[String] {
        &self.complaints
    }

    fn call(&mut self, method: &str, parameters: &Value) -> Result<Value> {
        self.last_id += 1;
        let mut request = json!({"id": self.last_id, "method": method, "params": parameters});
        if let Some(session) = &self.session {
            request["sessionId"] = json!(session);
        }
        let mut bytes = serde_json::to_vec(&request)?;
        bytes.push(0);
        self.requests.write_all(&bytes)?;
        let deadline = Instant::now() + PATIENCE;
        loop {
            let message = self.message(deadline).with_context(|| method.to_owned())?;
            if message["id"] == json!(self.last_id) {
                ensure!(message["error"].is_null(), "{method}: {}", message["error"]);
                return Ok(message["result"].clone());
            }
            self.note(&message);
        }
    }

    fn note(&mut self, event: &Value) {
        let complaint = match event["method"].as_str() {
            Some("Runtime.exceptionThrown") => &event["params"]["exceptionDetails"],
            Some("Log.entryAdded") if event["params"]["entry"]["level"] == "error" => {
                &event["params"]["entry"]["text"]
            }
            _ => return,
        };
        self.complaints.push(complaint.to_string());
    }

    /// The next message.
    fn message(&mut self, deadline: Instant) -> Result<Value> {
        loop {
            if let Some(end) = self.pending.iter().position(|byte| *byte == 0) {
                let message: Vec<u8> = self.pending.drain(..=end).collect();
                return Ok(serde_json::from_slice(&message[..end])?);
            }
            let left = deadline.saturating_duration_since(Instant::now());
            let mut awaited = [PollFd::new(self.answers.as_fd(), PollFlags::POLLIN)];
            if left.is_zero() || poll(&mut awaited, PollTimeout::try_from(left)?)? == 0 {
                bail!(
                    "the browser does not answer ({:?}): {}",
                    self.process.ended(),
                    tail(self.process.log(), 10)
                );
            }
            let mut bytes = vec![0; 1 << 16];
            let length = self.answers.read(&mut bytes)?;
            self.pending.extend(&bytes[..length]);
        }
    }
}
