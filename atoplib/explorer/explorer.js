// The page of the explorer. It sends numbered wishes to the kernel and draws what comes back; `widget.py` is the other end.

const fill = (element, attributes, children) => {
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (name in element && element.namespaceURI.endsWith("xhtml")) element[name] = value;
    else element.setAttribute(name, value);
  }
  element.append(...children);
  return element;
};
const make = (tag, attributes = {}, ...children) => fill(document.createElement(tag), attributes, children);
const draw = (tag, attributes = {}, ...children) =>
  fill(document.createElementNS("http://www.w3.org/2000/svg", tag), attributes, children);
const button = (text, title, press) => make("button", { type: "button", title, onclick: press }, text);
const bar = (...children) => make("div", { className: "atop-bar" }, ...children);
const faint = (...children) => make("span", { className: "atop-faint" }, ...children);
const space = () => make("span", { className: "atop-space" });
const digits = (value) => String(Number(value.toPrecision(3)));
const percent = (share) => `${Math.round(100 * share)} %`;

// ---- the pictures: one row a defence, from what `page.py` says of it

const drawDecision = (row) => {
  const [kind, mark, word] = row.correct ? ["right", "\u2713", "correct"] : ["wrong", "\u2717", "misclassified"];
  const bars = row.bars.flatMap(([name, share, kind]) => [
    make("span", { title: name }, name),
    make("div", {}, make("div", { className: `atop-of-${kind}`, style: `width: ${100 * share}%` })),
    make("span", {}, percent(share)),
  ]);
  return make("div", { className: "atop-decision" },
    make("p", { className: `atop-${kind}`, title: word }, `${row.text} `,
      make("span", { role: "img", ariaLabel: word }, mark)),
    make("div", { className: "atop-bars" }, ...bars),
    ...row.lines.map((line) => make("p", {}, line)));
};

const drawRow = (row, columns, shown) => {
  const name = make("div", { className: "atop-name" }, row.name);
  if (!row.cells) return make("div", { className: "atop-row" }, name, make("div", { className: "atop-wait" }));
  const image = (kind, src, alt = "") =>
    make("img", { className: `atop-${kind}${shown.crisp ? " atop-crisp" : ""}`, src, alt, draggable: false });
  const cells = columns.map((column) => {
    const cell = row.cells.find(([name]) => name === column);
    if (!cell) return make("div", { className: "atop-void" }, "no purifier");
    const over = column === "adversarial" ? [image("clean", shown.clean), image("ten", row.tenfold)] : [];
    return make("figure", {}, image(column, cell[1], `${row.name}: ${column} image`), ...over, make("figcaption", {}, cell[2]));
  });
  return make("div", { className: "atop-row" }, name, ...cells, drawDecision(row));
};

const drawGrid = (shown) => {
  const all = ["adversarial", "perturbation", "transformed", "purified"];
  const columns = all.slice(0, shown.rows.some((row) => !row.cells || row.cells.length > 2) ? 4 : 2);
  const heads = ["", ...columns, "decision"].map((name) => make("div", { className: "atop-head" }, name));
  return make("div", { className: "atop-grid", style: `--rows: ${shown.rows.length}; --columns: ${columns.length}` },
    ...heads, ...shown.rows.map((row) => drawRow(row, columns, shown)));
};

// ---- a chart: points [line, x, percent, maybe the ends of an interval]; choosing one sets a value to its x

const ticksTo = (last) => {
  const power = 10 ** Math.floor(Math.log10(last / 4));
  const step = [1, 2, 5, 10].map((size) => size * power).find((size) => last / size <= 5);
  return Array.from({ length: Math.floor(last / step + 1e-6) + 1 }, (_, n) => Number((n * step).toPrecision(6)));
};

const drawChart = ({ title, points, colours, sets, label, here }, choose) => {
  const left = 38, right = 230, top = 14, bottom = 86;
  const last = Math.max(...points.map(([, x]) => x)) || 1;
  const names = Object.keys(colours);
  const across = (x) => left + (right - left) * x / last, up = (y) => bottom - (bottom - top) * y / 100;
  const text = (x, y, anchor, words) => draw("text", { x, y, "text-anchor": anchor }, words);
  const ticks = ticksTo(last).map((tick) => text(across(tick), 102, "middle", digits(tick)));
  const scale = [0, 50, 100].map((y) => text(25, up(y) + 4, "end", `${y}`));
  const lines = names.map((name, number) => {
    const stroke = colours[name], lift = 1.5 * (number - (names.length - 1) / 2);  // equal lines are beside each other
    const series = points.filter(([line]) => line === name);
    const places = series.map(([, x, y]) => `${across(x)} ${up(y) + lift}`);
    const bands = series.filter((point) => point.length > 3).map(([, x, , low, high]) =>
      draw("path", { stroke, opacity: 0.5, d: `M${across(x)} ${up(low)}V${up(high)}` }));
    const dots = series.map(([, x, y, ...band]) => {
      const interval = band.length ? ` [${band.map(Math.round).join(", ")}]` : "";
      return draw("circle", { fill: stroke, cx: across(x), cy: up(y) + lift, r: 3.5, onclick: () => choose({ [sets]: x }) },
        draw("title", {}, `${name}, ${label} ${digits(x)}: ${Math.round(y)} %${interval}`));
    });
    const legend = draw("text", { x: 250, y: 18 + 15 * number, class: "atop-legend" }, draw("tspan", { fill: stroke }, "\u25cf"), ` ${name}`);
    return draw("g", { class: `atop-line-${sets}` }, draw("path", { stroke, fill: "none", d: `M${places.join("L")}` }), ...bands, ...dots, legend);
  });
  const ends = names.map((name) => points.filter(([line]) => line === name)).map((series) => `${series[0][0]} from ${Math.round(series[0][2])} to ${Math.round(series.at(-1)[2])} %`);
  return make("div", {}, make("p", { className: "atop-title" }, title),
    draw("svg", { viewBox: "0 0 330 118", role: "img", "aria-label": ends.join("; ") },
      draw("path", { class: "atop-axis", d: "M30 6V90H244" }), ...scale, ...ticks, text(134, 114, "middle", label),
      draw("path", { class: "atop-here", d: `M${across(here)} 6V90` }), ...lines));
};

function render({ model, el }) {
  const state = () => model.get("state");
  const layout = state();
  let asked = 0, waiting = false, pending = null, playing = null;

  // ---- wishes: those of a dragged slider wait for the picture of the one before, all others go at once
  const send = (wish) => model.send({ ...wish, number: ++asked });
  const set = (values, dragging = false) => {
    if (!dragging) pending = null;
    if (dragging && waiting) pending = { ...pending, ...values };
    else {
      waiting = dragging;
      send({ do: "set", values, dragging });
    }
  };
  const answered = () => {
    waiting = false;
    if (pending) {
      const values = pending;
      pending = null;
      set(values, true);
    }
  };

  // ---- one control of the table: a function that makes its field, and one that shows what it is now
  const slider = ({ name, label, help, low }) => {
    let held = false, unit = 1, rest = null, sent = false;
    const output = make("span", { className: "atop-value" }), field = make("input", { type: "range", ariaLabel: label, title: help, min: low });
    const wish = () => ({ [name]: Number(field.value) / unit });
    const tell = () => {
      output.textContent = unit === 255 ? `${field.value}/255` : unit === 100 ? `${field.value} %` : digits(Number(field.value));
    };
    const whole = () => {
      clearTimeout(rest);
      if (!sent) set(wish());
      sent = true;
    };
    const atRest = () => {  // held still so long after its picture came, a slider gets the whole attack
      if (waiting) rest = setTimeout(atRest, 150);
      else whole();
    };
    fill(field, {
      onpointerdown: () => { held = true; },
      onpointerup: () => { held = false; },
      onchange: whole,
      oninput: () => {
        tell();
        sent = false;
        clearTimeout(rest);
        if (!held) return;
        set(wish(), true);
        rest = setTimeout(atRest, 150);
      },
    }, []);
    const show = (now) => {
      unit = now.unit;
      field.ariaLabel = now.label;
      Object.assign(field, { max: String(Math.max(now.high, now.value) * unit), step: String(now.step * unit) });
      if (!held) field.value = String(Number((now.value * unit).toPrecision(9)));
      tell();
    };
    return [field, show, output];
  };
  const menu = ({ name, label, help }) => {
    let entries = [], known = "";
    const field = make("select", { ariaLabel: label, title: help, onchange: () => set({ [name]: entries[field.selectedIndex][0] }) });
    const show = (now) => {
      if (JSON.stringify([now.entries, now.random]) !== known) {
        known = JSON.stringify([now.entries, now.random]);
        entries = now.entries.flatMap(([, list]) => list);
        field.replaceChildren(...now.entries.flatMap(([group, list]) => {
          const options = list.map(([, title, about, why]) => (why && now.random !== false
            ? make("option", { title: why, disabled: true }, `${title}: ${why}`) : make("option", { title: about }, title)));
          return group ? [make("optgroup", { label: group }, ...options)] : options;
        }));
      }
      field.selectedIndex = entries.findIndex(([value]) => value === now.value);
      field.title = (entries[field.selectedIndex] ?? [])[2] || help;
    };
    return [field, show];
  };
  const check = ({ name, label, help }) => {
    const field = make("input", { type: "checkbox", ariaLabel: label, title: help, onchange: () => set({ [name]: field.checked }) });
    return [field, (now) => { field.checked = now.value; }];
  };
  const number = ({ name, label, help, low }) => {
    const field = make("input", { type: "number", ariaLabel: label, title: help, min: low, onchange: () => set({ [name]: Number(field.value) }) });
    return [field, (now) => { field.value = now.value; }];
  };
  const controls = {};
  const makeControl = (control) => {
    const [field, show, ...output] = { range: slider, menu, check, number }[control.kind](control);
    const text = make("span", {}, control.label);
    const element = make("label", { className: `atop-control atop-${control.kind}`, title: control.help }, text, field, ...output);
    controls[control.name] = (now) => {
      show(now);
      text.textContent = now.label;
      field.disabled = Boolean(now.why);
      element.hidden = Boolean(now.hidden);
      element.classList.toggle("atop-off", Boolean(now.why));
      element.title = now.why || now.help;
    };
    return element;
  };
  const at = (place) => Object.values(layout.controls).filter((control) => control.place === place).map(makeControl);

  // ---- image bar
  const classes = make("select", { ariaLabel: "class", title: "go through images of one class only" });
  const wanted = () => classes.selectedIndex - 1;
  const classMenu = make("select", { ariaLabel: "class of your image", title: "what your image really shows",
    onchange: () => send({ do: "label", label: classMenu.selectedIndex }) });
  const ownLabel = make("label", { className: "atop-own" }, "it is a ", classMenu);
  const file = make("input", { type: "file", accept: "image/*", ariaLabel: "image file", hidden: true, onchange: async () => {
    const bitmap = await createImageBitmap(file.files[0]).catch(() => ({ width: 0, height: 0 }));
    const scale = Math.min(1, 512 / Math.max(bitmap.width, bitmap.height));  // a photograph is too large for one message
    const copy = make("canvas", { width: Math.round(bitmap.width * scale), height: Math.round(bitmap.height * scale) });
    if (bitmap.width) copy.getContext("2d").drawImage(bitmap, 0, 0, copy.width, copy.height);
    send({ do: "draw", png: bitmap.width ? copy.toDataURL() : "" });
    file.value = "";
  } });
  const original = make("div", { className: "atop-original" });
  const picker = make("div", { className: "atop-picker" }, original, make("div", {},
    bar(classes,
      button("\u25c2", "previous image", () => send({ do: "move", by: -1, label: wanted() })),
      button("\u25b8", "next image", () => send({ do: "move", by: 1, label: wanted() }))),
    bar(button("Upload", "an image file of your own", () => file.click()), file,
      button("Draw", "a drawing pad", () => pad.togglePopover()))));

  // ---- drawing pad
  const canvas = make("canvas", { width: 224, height: 224, ariaLabel: "drawing pad", role: "img" });
  const pen = canvas.getContext("2d");
  const clear = () => { pen.fillStyle = "black"; pen.fillRect(0, 0, 224, 224); };
  Object.assign(pen, { lineCap: "round", lineJoin: "round", lineWidth: 20, strokeStyle: "white" });
  clear();
  const lineTo = (event) => { pen.lineTo(event.offsetX, event.offsetY); pen.stroke(); };
  canvas.addEventListener("pointerdown", (event) => {
    canvas.setPointerCapture(event.pointerId);
    pen.beginPath();
    pen.moveTo(event.offsetX, event.offsetY);
    lineTo(event);
  });
  canvas.addEventListener("pointermove", (event) => { if (event.buttons) lineTo(event); });
  const use = () => { send({ do: "draw", png: canvas.toDataURL() }); pad.hidePopover(); };
  const pad = make("div", { className: "atop-pad", popover: "auto" }, canvas, make("div", {},
    button("Use drawing", "attack and purify what you drew", use),
    button("Clear", "an empty pad", clear), button("Close", "close the pad", () => pad.hidePopover())));

  // ---- pictures, player and charts
  const grid = make("div", { className: "atop-shown" });
  const problem = make("div", { className: "atop-problem", role: "alert" });
  const path = make("div"), curve = make("div");
  const askCurve = make("div", {}, button("Accuracy over \u03b5", "robust accuracy of every defence shown", () => send({ do: "curve" })),
    make("p", { className: "atop-faint" }, "This attack on some images at several radii: takes a moment. A point of the curve can be chosen."));
  const toggle = (name, text, help) => button(text, help, (event) => {
    event.currentTarget.ariaPressed = String(root.classList.toggle(name));
  });
  const steps = () => model.get("shown").steps ?? [];
  const stop = () => { clearInterval(playing); playing = null; play.textContent = "\u25b6 Play"; };
  const step = () => {
    const now = state().controls.shown_step.value ?? Infinity;
    const next = steps().find((number) => number > now);
    if (next === undefined) stop();
    else set({ shown_step: next });
  };
  const start = () => {
    set({ shown_step: 0 });
    playing = setInterval(step, 400);
    play.textContent = "\u25a0 Stop";
  };
  const play = button("\u25b6 Play", "the attack step by step", () => (playing ? stop() : start()));
  const player = bar(play, ...at("player"),
    toggle("atop-blinking", "Blink", "clean and adversarial image in turn"),
    toggle("atop-tenfold", "\u00d710", "the clean image with ten times the perturbation"),
    button("Resample", "another sample of the random transform", () => set({ sample: state().controls.sample.value + 1 })),
    space(), button("GIF", "the attack step by step as an animation", () => send({ do: "save", kinds: ["gif"] })),
    button("Save", "PNG, PDF and YAML of what is on screen", () => send({ do: "save" })));
  const charts = make("div", { className: "atop-charts" }, path, make("div", {}, curve, askCurve));

  // ---- values under the pointer
  const probe = make("canvas", { width: 1, height: 1 }).getContext("2d", { willReadFrequently: true });
  const pixel = (image, x, y) => {
    probe.clearRect(0, 0, 1, 1);
    probe.drawImage(image, -x, -y);
    const colour = [...probe.getImageData(0, 0, 1, 1).data].slice(0, 3).map((value) => (value / 255).toFixed(2));
    return new Set(colour).size === 1 ? colour[0] : colour.join(" ");
  };
  const place = (offset, shown, natural) => Math.floor(offset / shown * natural);
  grid.addEventListener("pointermove", (event) => {
    const image = event.target.closest("img");
    if (!image) return;
    const x = place(event.offsetX, image.clientWidth, image.naturalWidth), y = place(event.offsetY, image.clientHeight, image.naturalHeight);
    const images = ["clean", "adversarial", "transformed", "purified"].map((kind) => [kind, image.closest(".atop-row").querySelector(`img.atop-${kind}`)]);
    hover.textContent = `pixel (${x}, ${y}): ` + images.filter(([, one]) => one).map(([kind, one]) => `${kind} ${pixel(one, x, y)}`).join(", ");
  });
  grid.addEventListener("pointerleave", () => { hover.textContent = ""; });

  // ---- side: controls, further options, YAML
  const about = make("p", { className: "atop-faint atop-about" });
  const options = make("div");
  const yaml = make("textarea", { ariaLabel: "parameters as YAML", rows: 5, spellcheck: false });
  const copy = button("Copy parameters", "for papermill, notebook 04_attack", () => {
    navigator.clipboard.writeText(yaml.value).then(() => { copy.textContent = "Copied"; setTimeout(() => { copy.textContent = "Copy parameters"; }, 1500); });
  });
  const main = at("main");
  main.splice(1, 0, about);
  const side = make("div", { className: "atop-side" }, picker, ...at("image"), ownLabel, ...main,
    make("details", {}, make("summary", {}, "More"), ...at("more"), options),
    make("details", {}, make("summary", {}, "Parameters"), yaml,
      make("div", {}, copy, button("Set from YAML", "from the text above, edited or pasted", () => send({ do: "yaml", text: yaml.value })))));

  // ---- top: defences and presets; status
  const rows = () => layout.defences.filter((_, n) => chips[n].firstChild.checked);
  const chips = layout.defences.map((name) => make("label", { className: "atop-chip" },
    make("input", { type: "checkbox", ariaLabel: `show ${name}`, onchange: (event) => {
      if (rows().length) set({ rows: rows() }); else event.target.checked = true;  // one is always shown
    } }), name));
  const { image: _image, rows: _rows, ...startValues } = layout.start;  // which stay as they are
  const preset = (name, help, values) => button(name, help, () => set({ ...startValues, ...values, shown_step: null }));
  const presets = Object.entries(layout.presets).map(([name, [help, values]]) => preset(name, help, values));
  const top = bar(faint("show"), ...chips, space(), faint("presets"), ...presets, preset("Reset", "all but the image as at the start", {}));
  const status = make("span", { role: "status", ariaLive: "polite" }), links = make("span"), hover = faint();
  const progress = make("progress", { ariaLabel: "progress" });
  const cancel = button("Cancel", "stop what is being computed", () => send({ do: "cancel" }));
  const again = button("Compute", "once more, as after a cancellation", () => send({ do: "compute" }));
  const feedback = make("div", { className: "atop-bar atop-feedback" }, progress, status, links, space(), hover, cancel, again);

  const hide = make("style", {}, `.atop-still-${layout.name} { display: none }`);
  // what is typed here is not for JupyterLab, which takes arrow keys for its own
  const root = make("div", { className: "atop atop-live", "data-lm-suppress-shortcuts": "true", onkeydown: (event) => event.stopPropagation() },
    hide, top, feedback, make("div", { className: "atop-main" }, side, make("div", { className: "atop-view" }, problem, grid, player, charts)), pad);
  el.append(root);

  // ---- what comes back
  const entitle = (menu, names, chosen) => {
    if (menu.length !== names.length || [...menu.options].some((option, n) => option.text !== names[n]))
      menu.replaceChildren(...names.map((name) => make("option", {}, name)));
    if (chosen !== undefined) menu.selectedIndex = chosen;
  };
  const makeOption = ([name, value], given) => {
    const kind = { boolean: "checkbox", number: "number" }[typeof value] ?? "text";
    const field = make("input", { type: kind, ariaLabel: `option ${name}`, step: "any", placeholder: "default", onchange: () => {
      const typed = field.value === "" ? null : isNaN(field.value) ? field.value : Number(field.value);
      set({ options: { ...given, [name]: kind === "checkbox" ? field.checked : typed } });
    } });
    if (kind === "checkbox") field.checked = value; else field.value = value ?? "";
    return make("label", { className: "atop-control" }, make("span", {}, name), field);
  };
  const showState = () => {
    const { classes: names, stale, own: isOwn, label, heard } = state();
    grid.classList.toggle("atop-stale", stale);
    const text = model.get("shown").yaml;
    if (text && !stale && document.activeElement !== yaml) yaml.value = text;
    entitle(classes, ["all", ...names]);
    entitle(classMenu, names, label);
    ownLabel.hidden = !isOwn;
    play.disabled = steps().length < 2;
    if (heard < asked || pending) return;  // newer wishes are on their way
    const now = structuredClone(state().controls), last = Math.max(1, ...steps());
    Object.assign(now.shown_step, { high: last, value: now.shown_step.value ?? last });
    now.queries.hidden = Boolean(now.queries.why);
    now.steps.hidden = Boolean(now.steps.why && !now.queries.why);
    for (const [name, show] of Object.entries(controls)) show(now[name]);
    chips.forEach((chip, n) => { chip.firstChild.checked = now.rows.value.includes(layout.defences[n]); });
    const entry = now.attack.entries.flatMap(([, list]) => list).find(([value]) => value === now.attack.value);
    about.textContent = about.title = entry[2];
    options.replaceChildren(...now.options.entries.map((entry) => makeOption(entry, now.options.value)));
  };
  const showPictures = () => {
    const shown = model.get("shown"), drawn = Boolean(shown.rows);
    problem.textContent = shown.problem ?? "";
    problem.hidden = !shown.problem;
    original.replaceChildren(...(drawn ? [
      make("img", { className: `atop-clean${shown.crisp ? " atop-crisp" : ""}`, src: shown.clean, alt: "clean image" }),
      make("p", {}, "clean, true class ", make("b", {}, shown.label))] : []));
    grid.replaceChildren(...(drawn ? [drawGrid(shown)] : []));
    path.replaceChildren(shown.path ? drawChart(shown.path, set) : faint(drawn ? state().controls.shown_step.why ?? "\u2026" : ""));
    curve.replaceChildren(...(shown.curve ? [drawChart(shown.curve, set)] : []));
    askCurve.hidden = Boolean(shown.curve);
    root.dataset.preview = Boolean(shown.preview);
    showState();
    answered();
  };
  const showStatus = () => {
    const now = model.get("status");
    status.textContent = status.title = now.text;
    links.replaceChildren(...(now.links ?? []).map(({ name, href }) => make("a", { href, download: name }, name)));
    progress.hidden = !now.busy;
    if (now.total) Object.assign(progress, { max: now.total, value: now.done }); else progress.removeAttribute("value");
    cancel.disabled = !now.busy;
    again.disabled = askCurve.firstChild.disabled = now.busy;
    root.dataset.busy = now.busy;
    if (!now.busy) answered();
  };
  const showAll = { "change:state": showState, "change:shown": showPictures, "change:status": showStatus };
  for (const [event, show] of Object.entries(showAll)) { model.on(event, show); show(); }
  return () => { stop(); for (const [event, show] of Object.entries(showAll)) model.off(event, show); };
}

export default { render };
