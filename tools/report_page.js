"use strict";

// The values of all curves at the step under the pointer.
for (const plot of document.querySelectorAll("svg.plot")) {
  const [low, high] = [Number(plot.dataset.low), Number(plot.dataset.high)];
  const cursor = plot.querySelector(".cursor");
  const lines = [...plot.querySelectorAll(".line")].map((line) => ({
    label: line.dataset.label,
    colour: line.classList[1],
    steps: line.dataset.steps.split(" ").map(Number),
    values: line.dataset.values.split(" ").map(Number),
  }));
  const tip = document.createElement("div");
  tip.className = "tip";
  tip.hidden = true;
  plot.after(tip);

  const nearest = (steps, step) =>
    steps.reduce((best, at, index) => (Math.abs(at - step) < Math.abs(steps[best] - step) ? index : best), 0);

  plot.addEventListener("pointermove", (event) => {
    const box = plot.getBoundingClientRect();
    const share = Math.min(1, Math.max(0, (event.clientX - box.left) / box.width));
    const wanted = low + share * (high - low);
    const found = lines.map((line) => nearest(line.steps, wanted));
    const steps = lines.map((line, index) => line.steps[found[index]]);
    const step = steps[nearest(steps, wanted)];
    const x = (step - low) / (high - low);
    cursor.setAttribute("x1", `${100 * x}%`);
    cursor.setAttribute("x2", `${100 * x}%`);
    const title = document.createElement("b");
    title.textContent = `step ${step.toLocaleString("en")}`;
    tip.replaceChildren(title);
    lines.forEach((line, index) => {
      if (Math.abs(steps[index] - step) > 0.02 * (high - low)) return;
      const row = document.createElement("span");
      row.className = line.colour;
      const value = line.values[found[index]].toLocaleString("en", { maximumSignificantDigits: 4 });
      row.textContent = `${line.label} ${value.replace("-", "\u2212")}${plot.dataset.unit}`;
      tip.append(row);
    });
    const frame = plot.parentElement.getBoundingClientRect();
    const left = box.left - frame.left + x * box.width;
    tip.hidden = false;
    tip.style.left = `${Math.max(0, Math.min(left + 12, frame.width - tip.offsetWidth))}px`;
    tip.style.top = `${box.top - frame.top + 8}px`;
    plot.classList.add("pointed");
  });
  plot.addEventListener("pointerleave", () => {
    tip.hidden = true;
    plot.classList.remove("pointed");
  });
}

// The videos of a prompt play together while they are in view; a click stops them.
const watched = new IntersectionObserver((rows) => {
  for (const row of rows)
    for (const video of row.target.querySelectorAll("video")) {
      if (!row.isIntersecting) video.pause();
      else if (!row.target.classList.contains("stopped")) video.play().catch(() => (video.controls = true));
    }
});
for (const shot of document.querySelectorAll(".shot")) {
  const videos = [...shot.querySelectorAll("video")];
  if (matchMedia("(prefers-reduced-motion: reduce)").matches) {
    for (const video of videos) video.preload = "metadata";
    continue;
  }
  for (const video of videos) {
    video.controls = false;
    video.addEventListener("click", () => {
      const stop = !shot.classList.contains("stopped");
      shot.classList.toggle("stopped", stop);
      for (const other of videos) {
        if (stop) other.pause();
        else other.play().catch(() => (other.controls = true));
      }
    });
  }
  watched.observe(shot);
}

// The settings in which all words of the search are.
const search = document.querySelector(".search input");
const rows = [...document.querySelectorAll("#settings tr")].slice(1);
search.addEventListener("input", () => {
  const words = search.value.toLowerCase().split(/\s+/);
  let count = 0;
  for (const row of rows) {
    row.hidden = !words.every((word) => row.textContent.toLowerCase().includes(word));
    count += !row.hidden;
  }
  document.querySelector(".search output").textContent = search.value ? `${count} of ${rows.length}` : "";
});
