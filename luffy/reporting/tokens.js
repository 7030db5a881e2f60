// The token view: GROUPS, a group's rows beside each other, each token in the colour of what is chosen.
const GRADIENT = (slope, p) => Math.abs(slope) * (1 - p);
const MEASURES = {
  probability: {
    of: token => token.p, scale: "log", low: 0.001, high: 1, hue: "--c1", less: true,
    says: "of the token under the policy; the strongest colour is the least likely",
  },
  "gradient share": {
    of: token => token.share, hue: "--c0",
    says: "of the group's gradient in the tokens' own logits, |slope| (1 - p), as if the group had just been sampled",
  },
  "shaping weight": {
    of: token => token.shaping, hue: "--c0",
    says: "gamma p / (p + gamma)^2 of a trace's token: what its advantage is multiplied by",
  },
  advantage: { of: token => token.advantage, signed: true, says: "of the token, as the objective has it" },
  "importance ratio": {
    of: token => token.ratio, scale: "log", signed: true,
    says: "policy over who wrote the token: the sampler of that time, a trace's teacher where it is known, else 1",
  },
  entropy: { of: token => token.entropy, hue: "--c2", says: "nats, of the distribution that the token was taken from" },
  "change since step 0": {
    of: token => token.change, signed: true, low: -1, high: 1, says: "of the token's probability",
  },
};
const known = value => value !== null && value !== undefined && isFinite(value);
const part = id => document.getElementById(id);
const three = value => shown(+value.toPrecision(3));
const percent = value => `${(100 * value).toFixed(value < 0.0995 ? 1 : 0)} %`;

// What is known of every token of a group by the weights after the step at `at` of its steps.
function tokensOf(group, at) {
  const rows = group.rows.map(row => row.tokens.map((text, n) => {
    const [logp, entropy, advantage, slope] = ["logp", "entropy", "advantage", "slope"].map(name => row[name][at][n]);
    const p = known(logp) ? Math.exp(logp) : null, first = row.logp[0][n], wrote = row.wrote[n] ?? (row.trace ? 0 : null);
    return {
      text, n, logp, p, entropy, advantage, slope, given: n < row.given,
      ratio: known(p) && known(wrote) ? Math.exp(logp - wrote) : null,
      shaping: row.trace && group.gamma && known(p) ? group.gamma * p / (p + group.gamma) ** 2 : null,
      change: group.steps[0] === 0 && known(p) && known(first) ? p - Math.exp(first) : null,
      gradient: known(p) && known(slope) ? GRADIENT(slope, p) : 0,
    };
  }));
  const all = rows.flat().reduce((sum, token) => sum + token.gradient, 0);
  for (const token of rows.flat()) token.share = all ? token.gradient / all : null;
  return rows;
}

const context = document.createElement("canvas").getContext("2d", {willReadFrequently: true});
const channels = colour => {  // whatever a stylesheet may say, as red, green, blue
  context.fillStyle = colour;
  context.fillRect(0, 0, 1, 1);
  return [...context.getImageData(0, 0, 1, 1).data.slice(0, 3)];
};
const variable = name => {
  const probe = tag("i", {style: `color:var(${name})`}, document.body), found = getComputedStyle(probe).color;
  probe.remove();
  return channels(found);
};
const luminance = rgb => {
  const [r, g, b] = rgb.map(one => (one /= 255) <= 0.04045 ? one / 12.92 : ((one + 0.055) / 1.055) ** 2.4);
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
};

// A measure over the values at hand: the limits of its scale, and a value's colour. The lightness falls with the
// strength, and what has a sign is blue or orange: both can be told apart without red and green.
function scaleOf(measure, values) {
  const forward = value => measure.scale === "log" ? Math.log(Math.max(value, 1e-6)) : value;
  const largest = values.filter(known).reduce((most, value) => Math.max(most, Math.abs(forward(value))), 1e-9);
  let low = measure.low ?? 0, high = measure.high ?? (measure.scale === "log" ? Math.exp(largest) : largest);
  if (measure.signed && measure.low === undefined) low = measure.scale === "log" ? 1 / high : -high;
  const back = variable("--back"), [plus, minus] = ["--c0", "--c1"].map(variable), hue = variable(measure.hue ?? "--c0");
  const strength = value => {
    const at = (forward(value) - forward(low)) / (forward(high) - forward(low) || 1);
    const inside = Math.min(1, Math.max(0, at));
    return measure.signed ? 2 * inside - 1 : measure.less ? 1 - inside : inside;
  };
  const colour = value => {
    const strong = strength(value), towards = measure.signed ? (strong > 0 ? plus : minus) : hue;
    return back.map((one, at) => Math.round(one + (towards[at] - one) * Math.abs(strong)));
  };
  return {low, high, colour};
}
const paint = (element, rgb) => {
  const light = luminance(rgb);  // the text that has more contrast
  element.style.background = `rgb(${rgb})`;
  element.style.color = (light + 0.05) ** 2 > 0.0525 ? "#000" : "#fff";
};

const visible = text => text.replace(/\n/g, "\u21b5\n").replace(/^$/, "\u00b7");
const titleOf = (row, group, n) => {
  const number = group.rows.slice(0, n + 1).filter(one => one.trace === row.trace).length;
  return row.own ? "earlier answer" : row.trace ? `trace${row.teacher ? ` of ${row.teacher}` : ""}` : `rollout ${number}`;
};

// The claim that shaping makes, on this trace: who has its gradient, with and without it. "" where it has none.
function emphasis(tokens) {
  const seen = tokens.filter(token => known(token.p)), rare = seen.filter(token => token.p < 0.2);
  const sum = (some, of) => some.reduce((all, one) => all + of(one), 0);
  const shaped = token => token.gradient, plain = token => token.p * (1 - token.p);
  if (!sum(seen, shaped) || !sum(seen, plain)) return "";
  if (!rare.length) return "No token is less likely than 0.2.";
  const [has, had] = [shaped, plain].map(of => percent(sum(rare, of) / sum(seen, of)));
  return `Tokens less likely than 0.2: ${percent(rare.length / seen.length)} of the trace, ${has} of its gradient; unshaped (weight p) ${had}.`;
}

// Gradient in a token's own logit over its probability, with and without shaping, and where the tokens of the group's
// first trace are.
function drawShape(tokens, gamma) {
  const box = part("shape"), W = 540, top = 10, left = 40, right = 128, height = 130, most = 0.3;
  box.replaceChildren();
  if (!tokens || !gamma) return;
  const svg = made("svg", {viewBox: `0 0 ${W} 150`, role: "img"}, box);
  const x = p => left + (W - left - right) * p, y = w => height - (height - top) * w / most;
  const curves = [
    ["shaped", "--c0", "", p => gamma * p / (p + gamma) ** 2 * (1 - p)],
    ["unshaped", "--c1", "6 4", p => p * (1 - p)],
  ];
  const crossing = Math.sqrt(gamma) - gamma;  // gamma p / (p + gamma)^2 = p
  svg.setAttribute("aria-label", `gradient of a trace's token over its probability: shaped it is larger below ${three(Math.max(0, crossing))} and smaller above`);
  for (const at of [0, 0.1, 0.2, 0.3]) {
    made("line", {class: "axis", x1: left, x2: W - right, y1: y(at), y2: y(at)}, svg);
    made("text", {class: "tick", x: left - 5, y: y(at) + 4, "text-anchor": "end"}, svg).textContent = at;
  }
  for (const [at, text] of [[0, 0], [0.5, "probability"], [1, 1]])
    made("text", {class: "tick", x: x(at), y: 146, "text-anchor": "middle"}, svg).textContent = text;
  curves.forEach(([name, hue, dash, of], n) => {
    const points = Array.from({length: 201}, (_, at) => `${x(at / 200).toFixed(1)},${y(of(at / 200)).toFixed(1)}`);
    made("path", {class: "curve", d: "M" + points.join("L"), style: `stroke:var(${hue})`, "stroke-dasharray": dash}, svg);
    made("line", {class: "curve", x1: W - right + 10, x2: W - right + 34, y1: 30 + 22 * n, y2: 30 + 22 * n, style: `stroke:var(${hue})`, "stroke-dasharray": dash}, svg);
    made("text", {class: "tick", x: W - right + 40, y: 34 + 22 * n}, svg).textContent = name;
  });
  for (const token of tokens) if (known(token.p)) made("line", {x1: x(token.p), x2: x(token.p), y1: height - 14, y2: height, style: "stroke:var(--text)", opacity: 0.45}, svg);
  tag("figcaption", {textContent: "What a trace's token of advantage 1 adds to the gradient in its own logit, by its probability; ticks are the tokens of this group's first trace."}, box);
}

function tell(row, token, title) {
  const told = part("told");
  told.replaceChildren();
  if (!token) return;
  tag("code", {textContent: visible(token.text)}, told);
  const numbers = [
    ["probability", token.p], ["log-prob", token.logp], ["entropy", token.entropy], ["advantage", token.advantage],
    ["ratio", token.ratio], ["shaping weight", token.shaping], ["slope of the loss", token.slope], ["change since step 0", token.change],
  ].filter(([, value]) => known(value)).map(([name, value]) => `${name} ${three(value)}`);
  if (known(token.share)) numbers.push(`gradient share ${percent(token.share)}`);
  told.append(` ${title}, token ${token.n + 1} of ${row.length}${token.given ? " (given)" : ""}: ${numbers.join(", ")}`);
}

// What is looked at, as long as the page is open: [row, token], and of each group its tokens at every step.
let looked = null;
const seen = new Map();
const allOf = group => {
  if (!seen.has(group)) seen.set(group, group.steps.map((_, at) => tokensOf(group, at)));
  return seen.get(group);
};

function drawScale(measure, scale) {
  for (const [id, value] of [["low", scale.low], ["high", scale.high]]) part(id).textContent = three(value);
  const canvas = part("scale").getContext("2d");
  for (let px = 0; px < 176; px++) {
    const share = px / 175, [low, high] = [scale.low, scale.high];
    canvas.fillStyle = `rgb(${scale.colour(measure.scale === "log" ? low * (high / low) ** share : low + (high - low) * share)})`;
    canvas.fillRect(px, 0, 1, 1);
  }
}

function drawRow(group, number, tokens, measure, scale) {
  const row = group.rows[number], title = titleOf(row, group, number), box = tag("section", {className: "row"});
  tag("h3", {textContent: title}, box);
  const share = tokens.reduce((sum, token) => sum + (token.share ?? 0), 0);
  const facts = [`reward ${shown(row.reward)}`, `${row.length} tokens${row.finished ? "" : ", cut off"}`, `${percent(share)} of the group's gradient`];
  if (row.length > row.tokens.length) facts.push(`the first ${row.tokens.length} are shown`);
  tag("p", {textContent: facts.join(", ")}, box);
  const text = tag("div", {className: "text", tabIndex: 0}, box);
  text.setAttribute("role", "group");
  text.setAttribute("aria-label", `${title}: its tokens; arrow keys go from one to the next`);
  const spans = tokens.map(token => {
    const span = tag("span", {textContent: visible(token.text)}, text), value = measure.of(token);
    if (token.given) span.className = "given";
    if (known(value)) paint(span, scale.colour(value));
    return span;
  });
  const said = row.trace && group.gamma ? emphasis(tokens) : "";
  if (said) tag("p", {textContent: said}, box);
  let here = -1;
  const go = next => {
    document.querySelector(".row .at")?.classList.remove("at");
    here = next;
    looked = [number, next];
    spans[here]?.classList.add("at");
    tell(row, tokens[here], title);
  };
  // a pointer that moves, not a page that moves under it: the slider and the arrow keys shift the rows
  text.onpointermove = text.onpointerdown = event => {
    const next = spans.indexOf(event.target);
    if (next >= 0 && (looked?.[0] !== number || looked[1] !== next)) go(next);
  };
  text.onkeydown = event => {
    const next = {ArrowLeft: here - 1, ArrowRight: here + 1, ArrowUp: here - 10, ArrowDown: here + 10, Home: 0, End: spans.length - 1}[event.key];
    if (next === undefined || event.ctrlKey || event.altKey || event.metaKey) return;
    event.preventDefault();
    go(Math.max(0, Math.min(spans.length - 1, next)));
    spans[here]?.scrollIntoView({block: "nearest"});
  };
  if (looked?.[0] === number) go(looked[1]);
  return box;
}

function drawTokens() {
  const group = GROUPS[+part("group").value], slider = part("step"), measure = MEASURES[part("measure").value];
  const steps = allOf(group), all = steps[+slider.value], step = group.steps[+slider.value];
  const scale = scaleOf(measure, steps.flat(2).map(measure.of));  // one for all steps: their colours can be compared
  part("after").textContent = step;
  slider.setAttribute("aria-valuetext", `step ${step}`);
  part("question").textContent = `${group.question}\nanswer: ${group.answer}`;
  part("meaning").textContent = measure.says + (all.flat().some(token => known(measure.of(token))) ? "" : "; not known of this group");
  drawScale(measure, scale);
  drawShape(all[group.rows.findIndex(row => row.trace)], group.gamma);
  if (!looked) tell();
  part("rows").replaceChildren(...group.rows.map((_, number) => drawRow(group, number, all[number], measure, scale)));
}

GROUPS.forEach((group, at) => tag("option", {value: at, textContent: `${NAMES.length > 1 ? NAMES[group.run] + ": " : ""}${group.id} (sampled in step ${group.sampled}${group.steps.length > 1 ? ", watched" : ""})`}, part("group")));
for (const name of Object.keys(MEASURES)) tag("option", {value: name, textContent: name}, part("measure"));
const chooseGroup = () => {
  const slider = part("step"), last = GROUPS[+part("group").value].steps.length - 1;
  looked = null;
  Object.assign(slider, {max: last, value: last, disabled: last === 0});
  drawTokens();
};
// For the page when it is loaded again, where other groups may have come before this one and it may have more steps.
const sameAs = (one, other) => ["run", "id", "sampled"].every(name => one[name] === other[name]);
const tokensLookedAt = () => {
  const {run, id, sampled, steps} = GROUPS[+part("group").value], at = +part("step").value;
  const focused = document.activeElement.matches(".row .text");
  return {group: {run, id, sampled}, step: at < steps.length - 1 ? steps[at] : null, looked, focused};
};
const lookAt = ({group, step, looked: before, focused}) => {
  const found = GROUPS.findIndex(one => sameAs(one, group));
  if (found < 0) return;
  part("group").value = found;
  chooseGroup();
  const near = GROUPS[found].steps.map(one => Math.abs(one - step));
  if (step !== null) part("step").value = near.indexOf(Math.min(...near));  // a long run's steps are thinned
  looked = before;
  drawTokens();
  document.querySelector(".row .at")?.scrollIntoView({block: "nearest"});
  if (focused) document.querySelector(".row:has(.at) .text")?.focus({preventScroll: true});
};
part("group").addEventListener("change", chooseGroup);
part("measure").addEventListener("change", drawTokens);
part("step").addEventListener("input", drawTokens);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawTokens);
part("measure").value = GROUPS[0].gamma ? "gradient share" : "probability";
chooseGroup();
