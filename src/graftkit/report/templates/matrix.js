"use strict";
(async () => {
  if (!("DecompressionStream" in window)) return; // the table without filters stays
  const packed = Uint8Array.from(atob(document.getElementById("data").textContent), (letter) => letter.charCodeAt(0));
  const unpacked = new Blob([packed]).stream().pipeThrough(new DecompressionStream("deflate"));
  const data = await new Response(unpacked).json();
  const at = (id) => document.getElementById(id);
  const EVERY = "*";
  const checks = data.checks.map(([name]) => name);
  // A verdict is one digit, the place of its name in the data; a dot is a check that was not run.
  const NOT_RUN = ".";
  const PROVEN = "0";
  const uncounted = new Set([NOT_RUN, ...data.uncounted.map(String)]);
  const nameOf = (digit) => (digit === NOT_RUN ? "none" : data.verdicts[digit]);
  const spoken = (digit) => (digit === NOT_RUN ? "not run" : nameOf(digit).replace("-", " "));

  // An element from its name, attributes and children; texts are never read as HTML.
  const el = (name, given = {}, ...children) => {
    const made = document.createElement(name);
    for (const [key, value] of Object.entries(given)) if (value !== null) made.setAttribute(key, value);
    made.append(...children);
    return made;
  };

  const families = data.families.map(([type, cls, modalities, introduced, runs]) => {
    const codes = new Set(runs.flatMap((run) => Object.values(run[5].codes ?? {}).flat()));
    return {
      type,
      cls,
      introduced,
      modalities: modalities.map((place) => data.modalities[place]),
      runs: new Map(runs.map((run) => [data.methods[run[0]], { outcome: run[1], verdicts: run[2], seconds: run[3], messages: run[4], extras: run[5] }])),
      text: [type, cls, ...[...codes].map((place) => data.codes[place])].join(" ").toLowerCase(),
    };
  });
  const byType = new Map(families.map((family) => [family.type, family]));

  // Releases are listed oldest first; "since" is one of them, or a year.
  const releases = Object.keys(data.released);
  const present = releases.filter((name) => families.some((family) => family.introduced === name)).reverse();
  const yearOf = (name) => data.released[name].slice(0, 4);
  const years = [...new Set(present.map(yearOf))];
  const isSince = (introduced, since) => {
    if (!introduced) return false;
    return years.includes(since) ? yearOf(introduced) >= since : releases.indexOf(introduced) >= releases.indexOf(since);
  };

  // ---- the state: what the filters say, and which cell is open; the address holds all of it
  const initial = () => ({ q: "", modality: [], method: data.methods[0], verdict: [], where: "outcome", since: "", cell: "" });
  let state = initial();

  const among = (value, allowed, otherwise) => (allowed.includes(value) ? value : otherwise);
  const readAddress = () => {
    const given = new URLSearchParams(location.hash.slice(1));
    const list = (key, allowed) => (given.get(key) ?? "").split(",").filter((value) => allowed.includes(value));
    return {
      q: given.get("q") ?? "",
      modality: list("modality", data.modalities),
      method: among(given.get("method"), [...data.methods, EVERY], data.methods[0]),
      verdict: list("verdict", data.verdicts),
      where: among(given.get("in"), ["any", ...checks], "outcome"),
      since: among(given.get("since"), [...years, ...present], ""),
      cell: given.get("cell") ?? "",
    };
  };
  const addressOf = (wanted) => {
    const usual = initial();
    const given = [
      ["q", wanted.q], ["modality", wanted.modality.join(",")], ["method", wanted.method], ["verdict", wanted.verdict.join(",")],
      ["in", wanted.where], ["since", wanted.since], ["cell", wanted.cell],
    ].filter(([key, value]) => value && value !== usual[key === "in" ? "where" : key]);
    return "#" + given.map(([key, value]) => `${key}=${encodeURIComponent(value).replaceAll("%2C", ",").replaceAll("%2F", "/")}`).join("&");
  };
  const change = (changes, remember = false) => {
    const next = { ...state, ...changes };
    history[remember ? "pushState" : "replaceState"](null, "", addressOf(next));
    show(next);
  };

  // ---- which families match
  const asked = (family, run, wanted) => {
    if (wanted.method === EVERY) return [...family.runs.values()].map((each) => each.outcome);
    if (wanted.where === "outcome") return [run.outcome];
    return wanted.where === "any" ? [...run.verdicts] : [run.verdicts[checks.indexOf(wanted.where)]];
  };
  // Side by side, methods are compared on the families that more than one was tried on.
  const severalMethods = families.some((family) => family.runs.size > 1);
  const isTried = (family, method) => (method === EVERY ? !severalMethods || family.runs.size > 1 : family.runs.has(method));
  const matches = (family, wanted, terms) => {
    const run = family.runs.get(wanted.method);
    if (!isTried(family, wanted.method)) return false;
    if (!terms.every((term) => family.text.includes(term))) return false;
    if (!wanted.modality.every((modality) => family.modalities.includes(modality))) return false;
    if (wanted.since && !isSince(family.introduced, wanted.since)) return false;
    return !wanted.verdict.length || asked(family, run, wanted).some((digit) => wanted.verdict.includes(nameOf(digit)));
  };

  // ---- the grid
  const grid = at("grid");
  let columns = [];
  let rows = [];
  let head = [];
  let focused = null;

  const verdictAt = (family, column, method) => {
    if (method === EVERY) return family.runs.get(column)?.outcome ?? NOT_RUN;
    return family.runs.get(method)?.verdicts[checks.indexOf(column)] ?? NOT_RUN;
  };
  const pathOf = (family, column, method) => [family.type, ...(method === EVERY ? [column] : [method, column])].join("/");

  const buildHead = () => {
    const row = el("div", { class: "row head", role: "row" }, el("div", { class: "corner", role: "columnheader" }, "family"));
    head = columns.map((column) => el("span", { class: "of" }));
    columns.forEach((column, place) => {
      const says = state.method === EVERY ? "" : data.checks[place][1];
      row.append(el("div", { role: "columnheader", title: says, class: firstExtra(column) ? "line" : null }, column, " ", head[place]));
    });
    return row;
  };
  // The first check that a proven family need not have is set apart by a line.
  const firstExtra = (column) => column === checks.find((check) => !data.proof.includes(check));

  const buildRow = (family, place) => {
    if (!isTried(family, state.method)) return el("div");
    const name = el("div", { class: "family", role: "rowheader", tabindex: -1, title: `${family.type}: ${family.cls}` }, el("b", {}, family.type));
    if (family.introduced && yearOf(family.introduced) === years[0]) name.append(el("span", { class: "new" }, family.introduced));
    name.append(el("span", { class: "modalities" }, family.modalities.join(" ")));
    const row = el("div", { class: "row", role: "row" }, name);
    for (const column of columns) {
      const digit = verdictAt(family, column, state.method);
      const line = firstExtra(column) ? " line" : "";
      row.append(el("div", { class: `cell ${nameOf(digit)}${line}`, role: "gridcell", tabindex: -1, "aria-label": `${family.type}, ${column}: ${spoken(digit)}` }));
    }
    row.dataset.place = place;
    return row;
  };

  const build = () => {
    columns = state.method === EVERY ? data.methods : checks;
    grid.style.setProperty("--columns", columns.length);
    at("matrix").classList.toggle("wide", columns.length > 12);
    rows = families.map(buildRow);
    const body = el("div", { class: "body", role: "rowgroup" }, ...rows);
    grid.replaceChildren(el("div", { role: "rowgroup", class: "heads" }, buildHead()), body);
    grid.setAttribute("aria-colcount", columns.length + 1);
    focused = null;
  };

  const filter = () => {
    const terms = state.q.toLowerCase().split(/\s+/).filter(Boolean);
    const proven = columns.map(() => 0);
    const tried = columns.map(() => 0);
    let shown = 0;
    families.forEach((family, place) => {
      const visible = matches(family, state, terms);
      rows[place].hidden = !visible;
      if (!visible) return;
      shown += 1;
      columns.forEach((column, index) => {
        const digit = verdictAt(family, column, state.method);
        tried[index] += !uncounted.has(digit);
        proven[index] += digit === PROVEN;
      });
    });
    head.forEach((place, index) => (place.textContent = tried[index] ? `${proven[index]}/${tried[index]}` : ""));
    const total = families.filter((family) => isTried(family, state.method)).length;
    at("count").textContent = shown === total ? `${total} families` : `${shown} of ${total} families`;
    at("none").hidden = shown > 0;
    grid.setAttribute("aria-rowcount", shown + 1);
    if (!focused || focused.parentElement.hidden) rove(rows.find((row) => !row.hidden)?.children[1] ?? null);
  };

  // One element of the grid can be reached by Tab; the arrows move it.
  const rove = (next, focus = false) => {
    if (focused) focused.tabIndex = -1;
    focused = next;
    if (!next) return;
    next.tabIndex = 0;
    if (focus) {
      next.focus({ preventScroll: true });
      next.scrollIntoView({ block: "nearest", inline: "nearest" });
    }
  };
  const neighbour = (from, down, right) => {
    const visible = rows.filter((row) => !row.hidden);
    const row = visible.indexOf(from.parentElement) + down;
    const column = [...from.parentElement.children].indexOf(from) + right;
    const target = visible[Math.max(0, Math.min(visible.length - 1, row))];
    return target?.children[Math.max(0, Math.min(columns.length, column))];
  };
  const MOVES = {
    ArrowDown: [1, 0], ArrowUp: [-1, 0], ArrowRight: [0, 1], ArrowLeft: [0, -1], PageDown: [10, 0], PageUp: [-10, 0],
    Home: [0, -Infinity], End: [0, Infinity],
  };
  const openElement = (element) => {
    const family = families[element.parentElement.dataset.place];
    const column = columns[[...element.parentElement.children].indexOf(element) - 1];
    if (column === undefined) change({ cell: family.type }, true);
    else if (verdictAt(family, column, state.method) !== NOT_RUN) change({ cell: pathOf(family, column, state.method) }, true);
  };
  grid.addEventListener("keydown", (event) => {
    if (!focused || event.altKey || event.metaKey) return;
    if (event.key === "Enter" || event.key === " ") {
      event.preventDefault();
      openElement(focused);
    } else if (MOVES[event.key]) {
      event.preventDefault();
      const [down, right] = MOVES[event.key];
      const far = event.ctrlKey && right ? Math.sign(right) * Infinity : down;
      rove(neighbour(focused, far, right), true);
    }
  });
  grid.addEventListener("click", (event) => {
    const element = event.target.closest(".cell, .family");
    if (!element) return;
    rove(element);
    openElement(element);
  });
  const elementOf = ([type, method, check]) => {
    const row = rows[families.indexOf(byType.get(type))];
    const place = columns.indexOf(state.method === EVERY ? method : check);
    return row?.children[place + 1];
  };

  // ---- the panel: a family, a family under one method, or one cell
  const panel = at("panel");
  const link = (path, ...content) => el("a", { href: addressOf({ ...state, cell: path }) }, ...content);
  const badge = (digit) => el("p", {}, el("span", { class: `badge ${nameOf(digit)}` }, spoken(digit)));
  const table = (entries) => {
    const lines = entries.map(([name, value]) => el("tr", {}, el("th", { scope: "row" }, name), el("td", {}, value)));
    return el("table", {}, el("tbody", {}, ...lines));
  };
  const duration = (seconds) => (seconds === null ? "" : `${seconds} s`);
  const isRule = (code) => data.docs !== null && /^GK\d{3}$/.test(code);
  const ruleLink = (code) => (isRule(code) ? el("a", { href: `${data.docs}/rules/${code}.md` }, code) : el("code", {}, code));

  const command = (text) => {
    const button = el("button", { type: "button" }, "Copy");
    button.addEventListener("click", async () => {
      try {
        await navigator.clipboard.writeText(text);
        button.textContent = "Copied";
      } catch {
        getSelection().selectAllChildren(shown);
        button.textContent = "Selected";
      }
      setTimeout(() => (button.textContent = "Copy"), 1500);
    });
    // Lines break between options only.
    const shown = el("pre", {}, ...text.split(/ (?=--)/).flatMap((part, index) => (index ? [" ", el("span", {}, part)] : [part])));
    return el("div", { class: "command" }, shown, button);
  };

  const steps = (family, method, current) => {
    const run = family.runs.get(method);
    const lines = checks.flatMap((check, place) => {
      const digit = run.verdicts[place];
      if (digit === NOT_RUN) return [];
      const made = link([family.type, method, check].join("/"), el("i", { class: `cell ${nameOf(digit)}` }), el("b", {}, check), el("span", {}, duration(run.seconds[place])));
      made.setAttribute("aria-label", `${check}: ${spoken(digit)}`);
      if (check === current) made.setAttribute("aria-current", "true");
      const said = data.messages[run.messages[place]];
      if (digit !== PROVEN && said && check !== current) made.append(el("span", { class: "said" }, said));
      return [el("li", {}, made)];
    });
    return el("ul", { class: "steps" }, ...lines);
  };

  const facts = (family) =>
    table([
      ["class", family.cls || "none"],
      ["modalities", family.modalities.join(", ")],
      ...(family.introduced ? [["in transformers since", `${family.introduced}, ${data.released[family.introduced]}`]] : []),
    ]);

  const overview = (family) => {
    const mini = el("div", { class: "mini" });
    mini.style.setProperty("--columns", checks.length);
    mini.append(el("div", { class: "line-of names", "aria-hidden": "true" }, el("i"), ...checks.map((check) => el("span", {}, check))));
    for (const [method, run] of family.runs) {
      const cells = checks.map((check, place) => {
        const digit = run.verdicts[place];
        const made = digit === NOT_RUN ? el("span") : link([family.type, method, check].join("/"));
        made.className = `cell ${nameOf(digit)}`;
        made.title = `${check}: ${spoken(digit)}`;
        made.setAttribute("aria-label", `${method}, ${check}: ${spoken(digit)}`);
        return made;
      });
      mini.append(el("div", { class: "line-of" }, link(`${family.type}/${method}`, method), ...cells));
    }
    return [facts(family), el("h3", {}, `Methods (${family.runs.size}) and checks`), mini];
  };

  const evidence = (family, method, check) => {
    const run = family.runs.get(method);
    const place = checks.indexOf(check);
    const extra = (kind) => run.extras[kind]?.[place];
    const parts = [badge(run.verdicts[place])];
    const said = data.messages[run.messages[place]];
    if (said) parts.push(el("p", {}, said));
    const codes = (extra("codes") ?? []).map((code) => ruleLink(data.codes[code]));
    if (codes.length) parts.push(el("p", {}, "Decided by ", ...codes.flatMap((code, index) => (index ? [", ", code] : [code]))));
    const figures = extra("figures");
    if (figures) parts.push(el("h3", {}, "Evidence"), table(data.figures[figures[0]].map((name, index) => [name, String(figures[index + 1])])));
    const names = { "{family}": family.type, "{method}": method, "{check}": check };
    const text = data.commands[extra("command") ?? 0].replace(/\{(family|method|check)\}/g, (name) => names[name]);
    parts.push(el("h3", {}, "Repeat it"), command(text));
    const versions = Object.entries(data.versions[extra("versions") ?? 0] ?? {});
    const took = run.seconds[place];
    parts.push(el("h3", {}, "Measured with"), table([...versions, ["seed", String(extra("seed") ?? 0)], ...(took === null ? [] : [["took", duration(took)]])]));
    parts.push(el("h3", {}, `All checks of ${family.type} with ${method}`), steps(family, method, check));
    return parts;
  };

  const crumbs = (parts) => {
    const above = parts.slice(0, -1).flatMap((part, index) => [link(parts.slice(0, index + 1).join("/"), part), " › "]);
    return el("nav", { "aria-label": "Where this is" }, ...(above.length ? above.slice(0, -1) : ["Family"]));
  };

  const contents = (parts) => {
    const [type, method, check] = parts;
    const family = byType.get(type);
    if (!method) return overview(family);
    if (check) return evidence(family, method, check);
    return [badge(family.runs.get(method).outcome), facts(family), el("h3", {}, "Checks"), steps(family, method)];
  };
  const known = ([type, method, check]) => {
    const run = byType.get(type)?.runs.get(method);
    if (method === undefined) return byType.has(type);
    return Boolean(run) && (check === undefined || (checks.includes(check) && run.verdicts[checks.indexOf(check)] !== NOT_RUN));
  };

  const drawPanel = (focus) => {
    const parts = state.cell ? state.cell.split("/") : [];
    const open = parts.length > 0 && known(parts);
    const was = !panel.hidden;
    panel.hidden = !open;
    document.body.classList.toggle("open", open);
    for (const element of grid.querySelectorAll("[aria-selected]")) element.removeAttribute("aria-selected");
    if (!open) {
      if (was && panel.contains(document.activeElement)) focused?.focus({ preventScroll: true });
      return;
    }
    const close = el("button", { type: "button", class: "close", "aria-label": "Close" }, "✕");
    close.addEventListener("click", () => closePanel());
    panel.replaceChildren(el("div", { class: "top" }, crumbs(parts), close), el("h2", { "aria-label": parts.join(", ") }, parts.at(-1)), ...contents(parts));
    panel.setAttribute("aria-label", parts.join(", "));
    panel.scrollTop = 0;
    const element = elementOf(parts);
    element?.setAttribute("aria-selected", "true");
    if (focus) panel.focus({ preventScroll: true });
    else if (element) element.scrollIntoView({ block: "nearest" });
    if (element && !element.parentElement.hidden) rove(element);
  };
  const closePanel = () => {
    change({ cell: "" });
    focused?.focus({ preventScroll: true });
  };

  // ---- the controls
  const options = (select, entries) => select.replaceChildren(...entries.map(([value, text]) => el("option", { value }, text)));
  const chips = (box, entries, key) => {
    box.replaceChildren(
      ...entries.map(([value, text, cls]) => {
        const button = el("button", { type: "button", "aria-pressed": "false", class: cls ?? null, "data-value": value }, text);
        button.addEventListener("click", () => {
          const chosen = state[key];
          change({ [key]: chosen.includes(value) ? chosen.filter((each) => each !== value) : [...chosen, value] });
        });
        return button;
      }),
    );
  };
  const presentVerdicts = () => {
    const digits = new Set(data.families.flatMap((family) => family[4].flatMap((run) => [run[1], ...run[2]])));
    return data.verdicts.filter((_, place) => digits.has(String(place))).map((name) => [name, name.replace("-", " "), name]);
  };
  const setUp = () => {
    options(at("method"), [...data.methods.map((name) => [name, name]), ...(data.methods.length > 1 ? [[EVERY, "all methods"]] : [])]);
    options(at("where"), [["outcome", "the whole proof"], ["any", "any check"], ...checks.map((name) => [name, name])]);
    options(at("since"), [
      ["", "any time"],
      ...years.map((year) => [year, year]),
      ...present.map((name) => [name, `${name} (${data.released[name]})`]),
    ]);
    chips(at("modalities"), data.modalities.map((name) => [name, name]), "modality");
    chips(at("verdicts"), presentVerdicts(), "verdict");
    at("since-label").hidden = present.length === 0;
    at("q").addEventListener("input", (event) => change({ q: event.target.value }));
    for (const key of ["method", "where", "since"]) at(key).addEventListener("change", (event) => change({ [key]: event.target.value }));
    at("clear").addEventListener("click", () => change({ ...initial(), cell: state.cell }));
    at("filters").addEventListener("submit", (event) => event.preventDefault());
    document.addEventListener("keydown", (event) => {
      const typing = /^(INPUT|SELECT|TEXTAREA)$/.test(document.activeElement?.tagName ?? "");
      if (event.key === "/" && !typing && !event.ctrlKey && !event.metaKey) {
        event.preventDefault();
        at("q").focus();
        at("q").select();
      } else if (event.key === "Escape") {
        if (!panel.hidden) closePanel();
        else if (document.activeElement === at("q")) change({ q: "" });
      }
    });
    new ResizeObserver(() => {
      const bar = at("filters");
      const height = getComputedStyle(bar).position === "sticky" ? bar.offsetHeight : 0;
      document.documentElement.style.setProperty("--bar-height", `${height}px`);
    }).observe(at("filters"));
    // Links change the address only; whatever changes it, the page follows.
    addEventListener("popstate", () => show(readAddress()));
    at("summary").addEventListener("click", (event) => {
      if (event.target.closest("a")) setTimeout(() => at("filters").scrollIntoView());
    });
    at("skip").addEventListener("click", (event) => {
      event.preventDefault();
      if (focused) rove(focused, true);
    });
  };
  const drawControls = () => {
    if (at("q").value !== state.q) at("q").value = state.q;
    for (const key of ["method", "where", "since"]) at(key).value = state[key];
    at("where").disabled = state.method === EVERY;
    for (const [box, key] of [["modalities", "modality"], ["verdicts", "verdict"]])
      for (const button of at(box).children) button.setAttribute("aria-pressed", state[key].includes(button.dataset.value));
    at("clear").hidden = addressOf({ ...state, cell: "" }) === "#";
    for (const each of document.querySelectorAll(".share a")) {
      const given = new URLSearchParams(each.hash.slice(1));
      const current = given.get("method") === state.method || state.modality.includes(given.get("modality")) || given.get("in") === state.where;
      each.setAttribute("aria-current", String(current));
    }
  };

  const show = (next) => {
    const rebuilt = !rows.length || next.method !== state.method;
    const moved = next.cell !== state.cell;
    const first = !rows.length;
    state = next;
    if (rebuilt) build();
    filter();
    drawControls();
    if (first || moved || rebuilt) drawPanel(moved && !first);
  };

  at("static").remove();
  at("filters").hidden = false;
  at("matrix").hidden = false;
  setUp();
  show(readAddress());
})();
