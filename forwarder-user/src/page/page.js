// The status page: asks for status.json once a second and draws what it says. It only reads, keeps what it has seen
// for the charts, and writes text as text, never as markup.
"use strict";

const INTERVAL_MS = 1000;
const PATIENCE_MS = 8000;
const SPAN_MS = 180_000; // what a chart shows
const MOST_BACKENDS = 12; // of a group, in the topology; the table has more
const MOST_ROWS = 500;
const SVG = "http://www.w3.org/2000/svg";

const byId = (id) => document.getElementById(id);

/** An element with attributes and children; strings become text. */
function make(name, attributes = {}, ...children) {
  const element = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  element.append(...children);
  return element;
}

function draw(name, attributes) {
  const element = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  return element;
}

/** Sets text only where it differs, so that a selection survives. */
function say(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

/** As `say`, of a sentence in which commands stand between backticks, as the command line shows them. */
function tell(element, text) {
  if (element.dataset.told === text) return;
  element.dataset.told = text;
  // Every other part is a command; one that is not closed stays text, backtick and all.
  const parts = text.split("`");
  const open = parts.length % 2 === 0 ? parts.pop() : null;
  if (open !== null) parts.push(`${parts.pop()}\`${open}`);
  element.replaceChildren(...parts.map((part, place) => (place % 2 ? make("code", {}, part) : part)));
}

/** Makes `parent` hold one child for each item, in order; children of items that stay are kept. */
function keep(parent, items, key, create, update) {
  const known = new Map([...parent.children].map((child) => [child.dataset.key, child]));
  items.forEach((item, place) => {
    const name = key(item);
    let child = known.get(name);
    known.delete(name);
    if (!child) {
      child = create(item);
      child.dataset.key = name;
    }
    if (parent.children[place] !== child) parent.insertBefore(child, parent.children[place] ?? null);
    update(child, item);
  });
  for (const child of known.values()) child.remove();
}

// ---- numbers for people ----

/** A number and its unit with the SI prefix that fits: ["57.4", "kbit/s"]. */
function scaled(number, unit) {
  let rest = number;
  for (const prefix of ["", "k", "M", "G"]) {
    if (rest < 999.5) {
      const digits = (prefix && rest < 99.5) || (rest > 0 && rest < 9.95) ? 1 : 0;
      return [rest.toFixed(digits), prefix + unit];
    }
    rest /= 1000;
  }
  return [rest.toFixed(1), `T${unit}`];
}

const short = (number, unit = "") => scaled(number, unit).join(unit ? " " : "");

const whole = (number) => number.toLocaleString("en").replaceAll(",", " ");
const percent = (share) => `${(share * 100).toFixed(share > 0 && share < 0.9995 ? 1 : 0)} %`;
const plural = (count, word) => `${whole(count)} ${word}${count === 1 ? "" : "s"}`;

function duration(secs) {
  const [days, hours, minutes] = [Math.floor(secs / 86400), Math.floor(secs / 3600) % 24, Math.floor(secs / 60) % 60];
  if (days) return `${days} d ${hours} h`;
  if (hours) return `${hours} h ${minutes} min`;
  return minutes ? `${minutes} min ${secs % 60} s` : `${secs} s`;
}

// ---- what was seen so far ----

/** Rates by name: [[time in ms, rate], …], oldest first. */
const seen = new Map();
let before = null;

function note(time, rates) {
  for (const name of seen.keys()) if (!rates.has(name)) seen.delete(name);
  for (const [name, rate] of rates) {
    const points = seen.get(name) ?? [];
    points.push([time, rate]);
    while (points[0][0] < time - SPAN_MS) points.shift();
    seen.set(name, points);
  }
}

const ends = (reason) => reason.verdict === "drop" || reason.verdict === "refuse";
const packets = (traffic) => traffic.rates.packets_in + traffic.rates.packets_out;
const total = (items, read) => items.reduce((sum, item) => sum + read(item), 0);

function remember(status, time) {
  const rates = new Map();
  rates.set("flows", total(status.listeners, (one) => one.rates.connections));
  rates.set("packets in", total(status.groups, (one) => one.rates.packets_in));
  rates.set("packets out", total(status.groups, (one) => one.rates.packets_out));
  rates.set("bits in", 8 * total(status.groups, (one) => one.rates.bytes_in));
  rates.set("bits out", 8 * total(status.groups, (one) => one.rates.bytes_out));
  for (const group of status.groups) {
    for (const backend of group.backends) rates.set(`backend ${group.name}/${backend.name}`, packets(backend));
  }
  // The agent counts drops and gives no rates of them. One that was restarted counts from zero again.
  let dropped = 0;
  for (const reason of status.reasons.filter(ends)) {
    const known = before?.reasons.get(reason.name) ?? reason.packets;
    const rate = before ? (1000 * Math.max(0, reason.packets - known)) / Math.max(1, time - before.time) : 0;
    rates.set(`reason ${reason.name}`, rate);
    dropped += rate;
  }
  rates.set("dropped", dropped);
  before = { time, reasons: new Map(status.reasons.map((reason) => [reason.name, reason.packets])) };
  note(time, rates);
}

const latest = (name) => seen.get(name)?.at(-1)[1] ?? 0;

// ---- charts ----

/** Draws lines of `names` over time into an SVG of 100 by 40, the newest at the right edge; returns the top's value. */
function chart(svg, names, time, span = SPAN_MS) {
  const lines = names.map(([name, colour]) => [seen.get(name) ?? [], colour]);
  const top = Math.max(1e-9, ...lines.flatMap(([points]) => points.map(([, rate]) => rate)));
  svg.setAttribute("viewBox", "0 0 100 40");
  svg.setAttribute("preserveAspectRatio", "none");
  svg.replaceChildren(draw("line", { class: "base", x1: 0, x2: 100, y1: 40, y2: 40 }));
  for (const [points, colour] of lines) {
    if (points.length < 2) continue;
    const place = ([at, rate]) => `${(100 - (100 * (time - at)) / span).toFixed(2)} ${(39 - (37 * rate) / top).toFixed(2)}`;
    const inside = points.filter(([at]) => at >= time - span);
    const path = inside.map(place).join(" L ");
    const [first, last] = [inside[0], inside.at(-1)].map((point) => place(point).split(" ")[0]);
    svg.append(
      draw("path", { class: `area ${colour}`, d: `M ${first} 40 L ${path} L ${last} 40 Z` }),
      draw("path", { class: `stroke ${colour}`, d: `M ${path}` }),
    );
  }
  return top;
}

function tile(id, parts, names, time, unit) {
  const tile = byId(id);
  if (!tile.querySelector("svg")) {
    tile.append(
      draw("svg", { class: "chart" }),
      make("div", { class: "scale" }, make("span", { class: "top" }), make("span", {}, "last 3 min")),
    );
  }
  const now = tile.querySelector(".now");
  keep(now, parts, (part) => part.key, () => make("span", {}, make("span", {}), make("small", {})), (span, part) => {
    span.className = part.colour ? `key ${part.colour}` : "";
    say(span.firstChild, part.text);
    say(span.lastChild, part.unit);
  });
  const top = chart(tile.querySelector("svg"), names, time);
  say(tile.querySelector(".top"), top > 1e-6 ? `top ${short(top, unit)}` : "quiet");
}

function drawTiles(time) {
  const part = (name, unit, after, colour) => {
    const [text, scaledUnit] = scaled(latest(name), unit);
    return { key: name, text, unit: `${scaledUnit} ${after}`.trim(), colour };
  };
  tile("chart-flows", [part("flows", "/s", "")], [["flows", "accent"]], time, "/s");
  tile(
    "chart-packets",
    [part("packets in", "/s", "in", "accent"), part("packets out", "/s", "out", "second")],
    [["packets in", "accent"], ["packets out", "second"]], time, "/s",
  );
  tile(
    "chart-bits",
    [part("bits in", "bit/s", "in", "accent"), part("bits out", "bit/s", "out", "second")],
    [["bits in", "accent"], ["bits out", "second"]], time, "bit/s",
  );
  tile("chart-dropped", [part("dropped", "/s", "packets")], [["dropped", "bad-colour"]], time, "/s");
}

// ---- topology ----

const TONES = { healthy: "good", unhealthy: "bad", ejected: "warn", draining: "warn", drained: "warn", up: "good", down: "bad" };

/** Health, or that it takes no new flows whatever its health is. */
function state(backend) {
  if (backend.drain && backend.health === "healthy") return backend.drain.is_done ? "drained" : "draining";
  return backend.health;
}

function endpoint(address, port) {
  const host = address.includes(":") && port !== null ? `[${address}]` : address;
  return port === null ? host : `${host}:${port}`;
}

function column(id, nodes) {
  keep(byId(id), nodes, (node) => node.key, () => make("div", { class: "node" }, make("b"), make("small"), make("small", { class: "rate" })), (element, node) => {
    element.className = `node ${node.tone ?? ""}`;
    element.title = node.title ?? "";
    element.dataset.node = node.key;
    element.dataset.state = node.state ?? "";
    const [name, text, rate] = element.children;
    say(name, node.name);
    say(text, node.text ?? "");
    say(rate, node.rate ?? "");
    text.hidden = !node.text;
    rate.hidden = !node.rate;
  });
}

let edges = [];

function drawTopology(status) {
  edges = [];
  const link = (from, to, rate, isBad = false) => edges.push({ from, to, rate, isBad });
  const pace = (rate) => (rate > 0 ? `${short(rate)} packets/s` : "");
  const flows = total(status.listeners, (one) => one.flows);
  column("column-clients", [{ key: "clients", name: "Clients", text: plural(flows, "flow"), rate: pace(latest("packets in") + latest("packets out")) }]);
  column("column-listeners", status.listeners.map((one) => {
    link("clients", `listener ${one.name}`, packets(one));
    link(`listener ${one.name}`, `group ${one.group}`, packets(one));
    const more = one.vips.length > 1 ? ` +${one.vips.length - 1}` : "";
    const title = [`${one.vips.join(", ")} port ${one.port}/${one.protocol}`];
    if (one.syn_cookies) title.push(`SYN cookies: ${whole(one.cookies_sent)} sent, ${whole(one.cookies_accepted)} accepted, ${whole(one.cookies_invalid)} refused`);
    if (one.source_rate) title.push(`${whole(one.flows_limited)} new flows dropped, of sources with more than ${whole(one.source_rate)} per second`);
    // Always is no news; beyond a limit is a flood.
    const isFlooded = one.cookies_sent_rate > 0 && one.syn_cookies !== "always";
    const flood = isFlooded ? ` · SYN flood, ${short(one.cookies_sent_rate)} cookies/s` : "";
    return {
      key: `listener ${one.name}`, name: one.name, title: title.join("\n"), tone: isFlooded ? "warn" : "", state: isFlooded ? "flooded" : "",
      text: `${endpoint(one.vip, one.port)}/${one.protocol}${more}${flood}`, rate: pace(packets(one)),
    };
  }));
  const backends = [];
  column("column-groups", status.groups.map((group) => {
    const all = group.backends.length;
    const healthy = group.healthy_backends;
    // Those in trouble first, as not all may be shown.
    const shown = [...group.backends].sort((a, b) => (a.health === "healthy") - (b.health === "healthy")).slice(0, MOST_BACKENDS);
    shown.sort((a, b) => group.backends.indexOf(a) - group.backends.indexOf(b));
    for (const backend of shown) {
      const key = `backend ${group.name}/${backend.name}`;
      const isBad = backend.health !== "healthy";
      link(`group ${group.name}`, key, packets(backend), isBad);
      if (backend.tunnel) link(key, `tunnel ${backend.tunnel}`, packets(backend), isBad);
      backends.push({
        key, name: status.groups.length > 1 ? `${group.name}/${backend.name}` : backend.name, tone: TONES[state(backend)], state: state(backend), title: backend.failure ?? "",
        text: `${endpoint(backend.address, backend.port)} · ${state(backend)}`, rate: pace(packets(backend)),
      });
    }
    if (all > shown.length) {
      backends.push({ key: `more ${group.name}`, name: `+ ${whole(all - shown.length)} more`, text: `of group ${group.name}` });
      link(`group ${group.name}`, `more ${group.name}`, 0);
    }
    return {
      key: `group ${group.name}`, name: group.name, tone: healthy === all ? "good" : healthy ? "warn" : "bad",
      text: `${healthy} of ${all} healthy · ${group.nat === "full" ? "full NAT" : "DNAT"}`, rate: pace(packets(group)),
    };
  }));
  column("column-backends", backends);
  byId("tunnels").hidden = status.tunnels.length === 0;
  byId("topology").classList.toggle("plain", status.tunnels.length === 0);
  column("column-tunnels", status.tunnels.map((tunnel) => {
    const behind = status.groups.flatMap((group) => group.backends.filter((backend) => backend.tunnel === tunnel.name));
    const health = tunnel.is_up ? tunnel.health : "down";
    return {
      key: `tunnel ${tunnel.name}`, name: tunnel.name, state: health, title: tunnel.diagnosis?.text ?? tunnel.failure ?? "",
      tone: TONES[health === "unchecked" || health === "unknown" ? "up" : health],
      text: `${tunnel.mode} · ${health === "unchecked" ? "up" : health}`,
      rate: tunnel.backends_held ? `holds ${plural(tunnel.backends_held, "backend")}` : pace(total(behind, packets)),
    };
  }));
  drawEdges();
}

function drawEdges() {
  const topology = byId("topology");
  const svg = topology.querySelector(".edges");
  const origin = topology.getBoundingClientRect();
  const nodes = new Map([...topology.querySelectorAll(".node")].map((node) => [node.dataset.node, node.getBoundingClientRect()]));
  const most = Math.max(1e-9, ...edges.map((edge) => edge.rate));
  svg.replaceChildren(...edges.flatMap(({ from, to, rate, isBad }) => {
    const [a, b] = [nodes.get(from), nodes.get(to)];
    if (!a || !b) return [];
    const [x1, y1] = [a.right - origin.left, a.top + a.height / 2 - origin.top];
    const [x2, y2] = [b.left - origin.left, b.top + b.height / 2 - origin.top];
    const middle = (x1 + x2) / 2;
    return [draw("path", {
      d: `M ${x1} ${y1} C ${middle} ${y1} ${middle} ${y2} ${x2} ${y2}`,
      class: isBad ? "bad" : rate > 0 ? "busy" : "",
      "stroke-width": (1.3 + (rate > 0 ? 3.2 * Math.sqrt(rate / most) : 0)).toFixed(2),
    })];
  }));
}

// ---- tables ----

/** What is not as usual with a backend, and what to do about it. */
function trouble(backend) {
  if (backend.drain && !backend.drain.is_done) return [`draining, ${plural(backend.drain.flows_left, "flow")} left`, ""];
  if (backend.ejection) return [`ejected by passive checks: ${backend.ejection.cause}`, ""];
  if (backend.diagnosis) return [backend.diagnosis.text, backend.diagnosis.hint ?? ""];
  return [backend.failure ?? "", ""];
}

function drawBackends(status, time) {
  const rows = status.groups.flatMap((group) => group.backends.map((backend) => ({ group, backend }))).slice(0, MOST_ROWS);
  const cells = ["name", "address", "health", "share", "flows", "new", "in", "out"];
  const numbers = { share: "share", flows: "flows", new: "new/s", in: "in/s", out: "out/s" };
  const create = () => {
    const row = make("tr", {}, ...cells.map((cell) => make("td", numbers[cell] ? { "data-field": cell, "data-label": numbers[cell], class: "n" } : { "data-field": cell })));
    row.children[2].className = "why";
    row.children[2].append(make("span", { class: "badge" }), make("small", { class: "problem" }), make("small", { class: "hint" }));
    const trend = make("td", { class: "trend" });
    trend.append(draw("svg", { class: "chart accent" }));
    row.append(trend);
    return row;
  };
  keep(byId("backends"), rows, ({ group, backend }) => `${group.name}/${backend.name}`, create, (row, { group, backend }) => {
    const texts = {
      name: `${group.name}/${backend.name}`,
      address: endpoint(backend.address, backend.port) + (backend.tunnel ? ` via ${backend.tunnel}` : ""),
      share: percent(backend.share), flows: whole(backend.flows), new: short(backend.rates.connections),
      in: short(backend.rates.bytes_in, "B"), out: short(backend.rates.bytes_out, "B"),
    };
    for (const cell of row.children) if (texts[cell.dataset.field] !== undefined) say(cell, texts[cell.dataset.field]);
    const [badge, problem, hint] = row.children[2].children;
    badge.className = `badge ${TONES[state(backend)] ?? ""}`;
    say(badge, state(backend));
    const [what, todo] = trouble(backend);
    tell(problem, what);
    tell(hint, todo);
    problem.hidden = !what;
    hint.hidden = !todo;
    chart(row.lastChild.firstChild, [[`backend ${group.name}/${backend.name}`, "accent"]], time);
  });
}

/** Text and hint by reason, from the agent; the page does without if they do not come. */
let reasons = new Map();

function drawDrops(status) {
  const rows = status.reasons.filter((reason) => ends(reason) && reason.packets > 0).sort((a, b) => b.packets - a.packets);
  byId("no-drops").hidden = rows.length > 0;
  const most = rows[0]?.packets ?? 1;
  const create = () => make("li", {},
    make("div", { class: "line" }, make("b"), make("span", { class: "badge" }), make("span", { "data-field": "packets" })),
    make("div", { class: "bar" }, make("i")), make("p"));
  keep(byId("drops"), rows, (reason) => reason.name, create, (item, reason) => {
    const [name, rate, count] = item.querySelector(".line").children;
    const pace = latest(`reason ${reason.name}`);
    say(name, `${reason.name} (${reason.verdict})`);
    rate.className = pace > 0 ? "badge bad" : "badge";
    say(rate, pace > 0 ? `${short(pace)}/s` : "not now");
    say(count, whole(reason.packets));
    item.querySelector("i").style.width = `${Math.max(1, (100 * reason.packets) / most)}%`;
    const known = reasons.get(reason.name);
    tell(item.querySelector("p"), known ? [known.text, known.hint].filter(Boolean).join(" ") : "");
  });
}

function drawGateway(status) {
  const { used, capacity } = status.pool;
  say(byId("pool-text"), `${whole(used)} of ${whole(capacity)} in use`);
  byId("pool-meter").value = capacity ? used / capacity : 0;
  keep(byId("interfaces"), status.interfaces, (one) => one.name, () => make("tr", {}, make("td"), make("td", {}, make("span")), make("td"), make("td")), (row, one) => {
    const link = one.is_up ? "up" : "down";
    say(row.children[0], one.name);
    row.children[1].firstChild.className = `badge ${TONES[link]}`;
    say(row.children[1].firstChild, link);
    say(row.children[2], one.attachment);
    say(row.children[3], one.sends ? "data path" : "stack");
  });
}

function drawHead(status) {
  say(byId("version"), status.version);
  say(byId("uptime"), `up ${duration(status.uptime_secs)}`);
  const warnings = byId("warnings");
  warnings.hidden = status.warnings.length === 0;
  keep(warnings, status.warnings, (text) => text, () => make("li", {}, make("span")), (item, text) => tell(item.firstChild, text));
}

// ---- the loop ----

function live(tone, text) {
  byId("live").className = tone;
  say(byId("live"), text);
  document.body.classList.toggle("stale", tone === "bad");
}

async function ask(path) {
  const answer = await fetch(path, { cache: "no-store", signal: AbortSignal.timeout(PATIENCE_MS) });
  if (!answer.ok) throw new Error(`${path}: ${answer.status}`);
  return answer.json();
}

let isLooking = false;

async function look() {
  // A page that nobody sees asks nothing.
  if (document.hidden || isLooking) return;
  isLooking = true;
  try {
    if (!reasons.size) reasons = new Map((await ask("reasons.json")).map((one) => [one.name, one]));
    const status = await ask("status.json");
    const time = performance.now();
    remember(status, time);
    drawHead(status);
    drawTiles(time);
    drawTopology(status);
    drawBackends(status, time);
    drawDrops(status);
    drawGateway(status);
    live("good", "live");
  } catch {
    live("bad", "the agent does not answer");
  } finally {
    isLooking = false;
  }
}

async function watch() {
  for (;;) {
    await look();
    await new Promise((resolve) => setTimeout(resolve, INTERVAL_MS));
  }
}

new ResizeObserver(drawEdges).observe(byId("topology"));
document.addEventListener("visibilitychange", look);
watch();
