// A small line chart: one metric over the completed rounds, from the points that the page carries.

const SVG = "http://www.w3.org/2000/svg";
const [WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM] = [360, 140, 44, 10, 10, 20];

export function draw(figure) {
  const points = figure.dataset.points.split(" ").map((pair) => pair.split(":").map(Number));
  const [first, final] = [points[0][0], points.at(-1)[0]];
  const values = points.map(([, value]) => value);
  const [low, high] = [Math.min(...values), Math.max(...values)];
  const x = (round) => LEFT + ((round - first) / (final - first || 1)) * (WIDTH - LEFT - RIGHT);
  const part = (value) => (high > low ? (value - low) / (high - low) : 0.5);
  const y = (value) => HEIGHT - BOTTOM - part(value) * (HEIGHT - TOP - BOTTOM);
  const svg = element("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img" });
  svg.append(named(`${figure.dataset.name} from round ${first} to ${final}: ${show(values[0])} to ${show(values.at(-1))}`));
  for (const value of new Set([low, high])) {
    svg.append(element("line", { class: "grid-line", x1: LEFT, x2: WIDTH - RIGHT, y1: y(value), y2: y(value) }));
    svg.append(text(LEFT - 6, y(value) + 4, "end", show(value)));
  }
  svg.append(text(LEFT, HEIGHT - 4, "start", first));
  if (final !== first) svg.append(text(WIDTH - RIGHT, HEIGHT - 4, "end", final));
  svg.append(element("polyline", { class: "line", points: points.map(([r, v]) => `${x(r)},${y(v)}`).join(" ") }));
  svg.append(element("circle", { class: "dot", cx: x(final), cy: y(values.at(-1)), r: 3 }));
  figure.append(svg);
}

function show(value) {
  return String(Number(value.toPrecision(3)));
}

function named(words) {
  const title = element("title", {});
  title.textContent = words;
  return title;
}

function text(x, y, anchor, words) {
  const label = element("text", { x, y, "text-anchor": anchor });
  label.textContent = words;
  return label;
}

function element(name, attributes) {
  const made = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  return made;
}
