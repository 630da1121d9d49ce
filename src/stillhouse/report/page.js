"use strict";
function prepare(root) {
  for (const button of root.querySelectorAll(".copy")) {
    button.hidden = false;
    button.addEventListener("click", async () => {
      const code = button.parentElement.querySelector("code");
      let copied = true;
      try {
        await navigator.clipboard.writeText(code.textContent);
      } catch {
        // Pages opened from a file may not reach the clipboard: the selected text can still be copied by hand.
        getSelection().selectAllChildren(code);
        copied = document.execCommand("copy");
      }
      button.textContent = copied ? "Copied" : "Selected";
      setTimeout(() => { button.textContent = "Copy"; }, 1500);
    });
  }
  for (const svg of root.querySelectorAll("svg[data-lines]")) {
    const lines = JSON.parse(svg.dataset.lines);
    const [left, right, steps] = ["left", "right", "steps"].map((name) => Number(svg.dataset[name]));
    const readout = svg.parentElement.querySelector(".readout");
    const rest = readout.textContent;
    const rule = document.createElementNS(svg.namespaceURI, "line");
    rule.setAttribute("class", "rule");
    rule.setAttribute("y1", 8);
    rule.setAttribute("y2", svg.viewBox.baseVal.height - 22);
    svg.addEventListener("pointermove", (event) => {
      const box = svg.getBoundingClientRect();
      const at = ((event.clientX - box.left) / box.width) * svg.viewBox.baseVal.width;
      const step = ((at - left) / (right - left)) * steps;
      const said = [];
      let shown = 0;
      for (const line of lines) {
        let near = 0;
        line.x.forEach((x, i) => { if (Math.abs(x - step) < Math.abs(line.x[near] - step)) near = i; });
        if (!line.x.length) continue;
        shown = line.x[near];
        said.push(lines.length > 1 ? `${line.name} ${line.y[near]}` : `${line.y[near]}`);
      }
      const x = left + (shown / steps) * (right - left);
      rule.setAttribute("x1", x);
      rule.setAttribute("x2", x);
      svg.append(rule);
      readout.textContent = `step ${shown.toLocaleString("en")}: ${said.join(", ")}`;
    });
    svg.addEventListener("pointerleave", () => {
      rule.remove();
      readout.textContent = rest;
    });
  }
}
prepare(document);
