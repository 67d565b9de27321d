// The page of the explorer. It sends numbered wishes to the kernel and shows what comes back; `widget.py` is the other end.

const make = (tag, attributes = {}, ...children) => {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (name in element && name !== "list") element[name] = value;
    else element.setAttribute(name, value);
  }
  element.append(...children);
  return element;
};
const button = (text, title, press) => make("button", { type: "button", title, onclick: press }, text);
const digits = (value) => String(Number(value.toPrecision(3)));

function render({ model, el }) {
  const layout = model.get("layout_");
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

  // ---- one control of the table
  const controls = {};
  const makeControl = (control) => {
    const { name, label, kind, help } = control;
    const text = make("span", {}, label), output = make("span", { className: "atop-value" });
    let field, show, entries = [], unit = 1;
    if (kind === "range") {
      let held = false;
      const read = () => Number(field.value) / unit;
      const tell = () => { output.textContent = unit === 255 ? `${field.value}/255` : unit === 100 ? `${field.value} %` : digits(read()); };
      field = make("input", {
        type: "range", ariaLabel: label, title: help, min: control.low,
        onpointerdown: () => { held = true; },
        onpointerup: () => { held = false; },
        oninput: () => { tell(); if (held) set({ [name]: read() }, true); },
        onchange: () => { tell(); pending = null; set({ [name]: read() }); },
      });
      show = (now) => {
        unit = now.unit;
        if (now.label) { text.textContent = now.label; field.ariaLabel = now.label; }
        Object.assign(field, { max: String(now.high * unit), step: String(now.step * unit) });
        if (!held) field.value = String(Number((now.value * unit).toPrecision(9)));
        tell();
      };
    } else if (kind === "menu") {
      field = make("select", { ariaLabel: label, title: help, onchange: () => set({ [name]: entries[field.selectedIndex][0] }) });
      let known = "";
      show = (now) => {
        if (JSON.stringify(now.entries) !== known) {
          known = JSON.stringify(now.entries);
          field.replaceChildren(...now.entries.map(([group, list]) => {
            const options = list.map(([, title, about]) => make("option", { title: about }, title));
            return group ? make("optgroup", { label: group }, ...options) : options;
          }).flat());
          entries = now.entries.flatMap(([, list]) => list);
        }
        field.selectedIndex = entries.findIndex(([value]) => value === now.value);
        field.title = (entries[field.selectedIndex] ?? [])[2] || help;
      };
    } else {
      const check = kind === "check";
      field = make("input", {
        type: check ? "checkbox" : "number", ariaLabel: label, title: help, min: control.low,
        onchange: () => set({ [name]: check ? field.checked : Number(field.value) }),
      });
      show = (now) => { if (check) field.checked = now.value; else field.value = now.value; };
    }
    const element = make("label", { className: `atop-control atop-${kind}`, title: help }, text, field, output);
    controls[name] = (now) => {
      show(now);
      field.disabled = Boolean(now.why);
      element.hidden = Boolean(now.hidden);
      element.classList.toggle("atop-off", Boolean(now.why));
      element.title = now.why || help;
    };
    return element;
  };
  const at = (place) => layout.controls.filter((control) => control.place === place).map(makeControl);

  // ---- image bar
  const classes = make("select", { ariaLabel: "class", title: "go through images of one class only" });
  const wanted = () => classes.selectedIndex - 1;
  const own = make("select", { ariaLabel: "class of your image", title: "what your image really shows",
    onchange: () => send({ do: "label", label: own.selectedIndex }) });
  const ownLabel = make("label", { className: "atop-own" }, "it is a ", own);
  const file = make("input", { type: "file", accept: "image/*", ariaLabel: "image file", hidden: true, onchange: async () => {
    const bitmap = await createImageBitmap(file.files[0]).catch(() => ({ width: 0, height: 0 }));
    const scale = Math.min(1, 512 / Math.max(bitmap.width, bitmap.height));  // a photograph is too large for one message
    const copy = make("canvas", { width: Math.round(bitmap.width * scale), height: Math.round(bitmap.height * scale) });
    if (bitmap.width) copy.getContext("2d").drawImage(bitmap, 0, 0, copy.width, copy.height);
    send({ do: "draw", png: bitmap.width ? copy.toDataURL() : "" });
    file.value = "";
  } });
  const presets = layout.presets.map(([name, title, help]) => button(title, help, () => send({ do: "preset", name })));
  const original = make("div", { className: "atop-original" });
  const picker = make("div", { className: "atop-picker" }, original, make("div", {},
    make("div", { className: "atop-bar" }, classes,
      button("\u25c2", "previous image", () => send({ do: "move", by: -1, class: wanted() })),
      button("\u25b8", "next image", () => send({ do: "move", by: 1, class: wanted() }))),
    button("Next misclassified", "the next image that a defence misclassifies without an attack", () => send({ do: "search", class: wanted() })),
    make("div", { className: "atop-bar" }, button("Upload", "an image file of your own", () => file.click()), file,
      button("Draw", "a drawing pad", () => pad.togglePopover()))));

  // ---- drawing pad
  const canvas = make("canvas", { width: 224, height: 224, ariaLabel: "drawing pad", role: "img" });
  const pen = canvas.getContext("2d");
  const clear = () => { pen.fillStyle = "black"; pen.fillRect(0, 0, 224, 224); };
  Object.assign(pen, { lineCap: "round", lineJoin: "round", lineWidth: 20, strokeStyle: "white" });
  clear();
  const where = (event) => [event.offsetX, event.offsetY];
  canvas.addEventListener("pointerdown", (event) => {
    canvas.setPointerCapture(event.pointerId);
    pen.beginPath(); pen.moveTo(...where(event)); pen.lineTo(...where(event)); pen.stroke();
  });
  canvas.addEventListener("pointermove", (event) => { if (event.buttons) { pen.lineTo(...where(event)); pen.stroke(); } });
  const pad = make("div", { className: "atop-pad", popover: "auto" }, canvas, make("div", {},
    button("Use drawing", "attack and purify what you drew", () => { send({ do: "draw", png: canvas.toDataURL() }); pad.hidePopover(); }),
    button("Clear", "an empty pad", clear), button("Close", "close the pad", () => pad.hidePopover())));

  // ---- pictures, player and charts
  const grid = make("div", { className: "atop-shown" });
  const problem = make("div");
  const path = make("div"), curve = make("div");
  const askCurve = make("div", {}, button("Accuracy over \u03b5", "robust accuracy of every defence shown", () => send({ do: "curve" })),
    make("p", { className: "atop-faint" }, "This attack on 32 images at six radii: takes a moment. A point of the curve can be chosen."));
  const toggle = (name, text, help) => button(text, help, (event) => {
    event.currentTarget.ariaPressed = String(root.classList.toggle(name));
  });
  const play = button("\u25b6 Play", "the attack step by step", () => (playing ? stop() : start()));
  const step = () => {
    const { steps, controls: now } = model.get("state");
    const next = steps.find((number) => number > now.shown_step.value);
    if (next === undefined) stop();
    else set({ shown_step: next });
  };
  const start = () => {
    const { steps } = model.get("state");
    if (steps.length < 2) return;
    set({ shown_step: steps[0] });
    playing = setInterval(step, 400);
    play.textContent = "\u25a0 Stop";
  };
  const stop = () => { clearInterval(playing); playing = null; play.textContent = "\u25b6 Play"; };
  const player = make("div", { className: "atop-bar" }, play, ...at("player"),
    toggle("atop-blinking", "Blink", "clean and adversarial image in turn"),
    toggle("atop-tenfold", "\u00d710", "the clean image with ten times the perturbation"),
    button("Resample", "another sample of the random transform", () => send({ do: "resample" })),
    make("span", { className: "atop-space" }), button("GIF", "the attack step by step as an animation", () => send({ do: "gif" })),
    button("Save", "PNG, PDF and YAML of what is on screen", () => send({ do: "save" })));
  const wish = (event) => { const chosen = event.target.closest("[data-wish]"); if (chosen) set(JSON.parse(chosen.dataset.wish)); };
  const charts = make("div", { className: "atop-charts", onclick: wish }, path, make("div", {}, curve, askCurve));

  // ---- values under the pointer
  const probe = make("canvas", { width: 1, height: 1 }).getContext("2d", { willReadFrequently: true });
  const pixel = (image, x, y) => {
    probe.clearRect(0, 0, 1, 1);
    probe.drawImage(image, -x, -y);
    const colour = [...probe.getImageData(0, 0, 1, 1).data].slice(0, 3).map((value) => (value / 255).toFixed(2));
    return new Set(colour).size === 1 ? colour[0] : colour.join(" ");
  };
  grid.addEventListener("pointermove", (event) => {
    const image = event.target.closest("img");
    if (!image) return;
    const x = Math.floor(event.offsetX / image.clientWidth * image.naturalWidth), y = Math.floor(event.offsetY / image.clientHeight * image.naturalHeight);
    const kinds = ["clean", "adversarial", "transformed", "purified"];
    const row = image.closest(".atop-row") ?? grid;
    const parts = kinds.map((kind) => [kind, (kind === "clean" ? original : row).querySelector(`img.atop-${kind}`)]);
    hover.textContent = `pixel (${x}, ${y}): ` + parts.filter(([, one]) => one).map(([kind, one]) => `${kind} ${pixel(one, x, y)}`).join(", ");
  });
  grid.addEventListener("pointerleave", () => { hover.textContent = ""; });

  // ---- side: controls, defences, further options, YAML
  const chips = layout.defences.map((name) => make("label", { className: "atop-chip" },
    make("input", { type: "checkbox", ariaLabel: `show ${name}`, onchange: () => set({ rows: layout.defences.filter((_, n) => chips[n].firstChild.checked) }) }), name));
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
    make("details", {}, make("summary", {}, "Parameters"), yaml, make("div", {}, copy, button("Set from YAML", "from the text above, edited or pasted", () => send({ do: "yaml", text: yaml.value })))));

  // ---- foot: status
  const status = make("span", { role: "status", ariaLive: "polite" }), links = make("span"), hover = make("span", { className: "atop-faint" });
  const bar = make("progress", { ariaLabel: "progress" });
  const cancel = button("Cancel", "stop what is being computed", () => send({ do: "cancel" }));
  const again = button("Compute", "once more, as after a cancellation", () => send({ do: "compute" }));
  const foot = make("div", { className: "atop-bar atop-foot" }, bar, status, links, make("span", { className: "atop-space" }), hover, cancel, again);

  const hide = make("style", {}, `.atop-still-${layout.name} { display: none }`);
  const presetBar = make("div", { className: "atop-bar" }, make("span", { className: "atop-faint" }, "show"), ...chips,
    make("span", { className: "atop-space" }), make("span", { className: "atop-faint" }, "presets"), ...presets,
    button("Reset", "as at the start", () => send({ do: "preset", name: "reset" })));
  // what is typed here is not for JupyterLab, which takes arrow keys for its own
  const root = make("div", { className: "atop atop-live", "data-lm-suppress-shortcuts": "true", onkeydown: (event) => event.stopPropagation() }, hide, presetBar,
    make("div", { className: "atop-main" }, side, make("div", { className: "atop-view" }, problem, grid, player, charts)), foot, pad);
  el.append(root);

  // ---- what comes back
  const fill = (menu, names, chosen) => {
    if (menu.length !== names.length || [...menu.options].some((option, n) => option.text !== names[n]))
      menu.replaceChildren(...names.map((name) => make("option", {}, name)));
    if (chosen !== undefined) menu.selectedIndex = chosen;
  };
  const showState = () => {
    const state = model.get("state");
    grid.classList.toggle("atop-stale", state.stale);
    fill(classes, ["all classes", ...state.classes]);
    fill(own, state.classes, state.label);
    ownLabel.hidden = !state.own;
    play.disabled = state.steps.length < 2;
    if (state.heard < asked || pending) return;  // newer wishes are on their way
    for (const [name, now] of Object.entries(state.controls)) controls[name](now);
    chips.forEach((chip, n) => { chip.firstChild.checked = state.rows.includes(layout.defences[n]); });
    const entries = state.controls.attack.entries.flatMap(([, list]) => list);
    about.textContent = (entries.find(([value]) => value === state.controls.attack.value) ?? [])[2] ?? "";
    about.title = about.textContent;
    options.replaceChildren(...state.options.map(({ name, value }) => {
      const kind = typeof value === "boolean" ? "checkbox" : typeof value === "number" ? "number" : "text";
      const field = make("input", { type: kind, ariaLabel: name, step: "any", placeholder: "default", onchange: () => {
        const given = kind === "checkbox" ? field.checked : field.value === "" ? null : isNaN(field.value) ? field.value : Number(field.value);
        send({ do: "option", name, value: given });
      } });
      if (kind === "checkbox") field.checked = value; else field.value = value ?? "";
      return make("label", { className: "atop-control" }, make("span", {}, name), field);
    }));
  };
  const showPictures = () => {
    const shown = model.get("shown");
    problem.innerHTML = shown.problem ?? "";
    original.innerHTML = shown.problem ? "" : shown.clean ?? "";
    grid.innerHTML = shown.problem ? "" : shown.grid ?? "";
    path.innerHTML = shown.problem ? "" : shown.path ?? "";
    curve.innerHTML = shown.curve ?? "";
    askCurve.hidden = Boolean(shown.curve);
    if (shown.yaml && document.activeElement !== yaml) yaml.value = shown.yaml;
    root.dataset.preview = Boolean(shown.preview);
    answered();
  };
  const showStatus = () => {
    const now = model.get("status");
    status.textContent = now.text;
    status.title = now.text;
    links.replaceChildren(...(now.links ?? []).map(({ name, href }) => make("a", { href, download: name }, name)));
    bar.hidden = !now.busy;
    if (now.total) Object.assign(bar, { max: now.total, value: now.done }); else bar.removeAttribute("value");
    cancel.disabled = !now.busy;
    again.disabled = now.busy;
    root.dataset.busy = now.busy;
    if (!now.busy) answered();
  };
  const showAll = { "change:state": showState, "change:shown": showPictures, "change:status": showStatus };
  for (const [event, show] of Object.entries(showAll)) { model.on(event, show); show(); }
  return () => { stop(); for (const [event, show] of Object.entries(showAll)) model.off(event, show); };
}

export default { render };
