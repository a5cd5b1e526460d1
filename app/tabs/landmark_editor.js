// Landmarks as points to drag, or to move with the arrow keys; the value is {points, contours, size}.
const SVG = "http://www.w3.org/2000/svg";
let dragged = null;

function make(name, attributes, parent) {
  const node = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  parent.appendChild(node);
  return node;
}

function lines(svg, value) {
  svg.querySelectorAll("polyline").forEach((line) => line.remove());
  for (const contour of value.contours) {
    const points = value.points.slice(contour.start, contour.stop);
    if (contour.closed) points.push(points[0]);
    const line = make("polyline", { points: points.join(" "), fill: "none", stroke: contour.color, "stroke-width": value.size / 70 }, svg);
    svg.prepend(line);
  }
}

function draw() {
  const root = element.querySelector(".editor");
  if (!root) return;
  const value = props.value || { points: [], contours: [], size: 1 };
  root.replaceChildren();
  if (!value.points.length) return;
  const hint = document.createElement("p");
  hint.textContent = "or drag the points of the face (keyboard: Tab to a point, then the arrow keys)";
  root.appendChild(hint);
  const svg = make("svg", { viewBox: `0 0 ${value.size} ${value.size}`, "aria-label": "landmarks to drag" }, root);
  lines(svg, value);
  value.points.forEach(([x, y], index) => {
    const dot = make("circle", { cx: x, cy: y, r: value.size / 60, tabindex: 0, "data-index": index }, svg);
    dot.addEventListener("pointerdown", (event) => {
      dragged = dot;
      dot.setPointerCapture(event.pointerId);
      event.preventDefault();
    });
    dot.addEventListener("pointermove", (event) => {
      if (dragged !== dot) return;
      const box = svg.getBoundingClientRect();
      move(svg, value, dot, ((event.clientX - box.left) / box.width) * value.size, ((event.clientY - box.top) / box.height) * value.size);
    });
    dot.addEventListener("pointerup", () => {
      if (dragged === dot) {
        dragged = null;
        tell(value);
      }
    });
    dot.addEventListener("keydown", (event) => {
      const step = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key];
      if (!step) return;
      event.preventDefault();
      const [px, py] = value.points[index];
      move(svg, value, dot, px + (step[0] * value.size) / 128, py + (step[1] * value.size) / 128);
      tell(value);
    });
  });
}

function move(svg, value, dot, x, y) {
  const inside = (number) => Math.min(Math.max(number, 0), value.size - 1);
  const point = [Math.round(inside(x) * 10) / 10, Math.round(inside(y) * 10) / 10];
  value.points[Number(dot.dataset.index)] = point;
  dot.setAttribute("cx", point[0]);
  dot.setAttribute("cy", point[1]);
  lines(svg, value);
}

function tell(value) {
  const focused = document.activeElement && document.activeElement.dataset.index;
  props.value = JSON.parse(JSON.stringify(value));
  trigger("input");
  setTimeout(() => {
    if (!element.querySelector("svg")) draw();
    if (focused !== undefined) element.querySelector(`circle[data-index="${focused}"]`)?.focus();
  }, 0);
}

watch("value", draw);
draw();
