"use strict";
// Sorting by a click on a column's title, and the two filters. Without scripts the page shows everything.
const body = document.querySelector("#board tbody");
const titles = [...document.querySelectorAll("#board thead th")];

function sortBy(index) {
  const title = titles[index];
  const numeric = title.classList.contains("number");
  const before = title.getAttribute("aria-sort");
  const falling = before === "none" ? numeric : before === "ascending";
  titles.forEach((other) => other.setAttribute("aria-sort", "none"));
  title.setAttribute("aria-sort", falling ? "descending" : "ascending");
  const value = (row) => row.children[index].dataset.sort;
  const compare = (one, other) => (numeric ? one - other : one.localeCompare(other));
  const rows = [...body.rows].sort((one, other) => {
    const [a, b] = [value(one), value(other)];
    if (a === "" || b === "") return (a === "") - (b === ""); // what was not measured comes last either way
    return falling ? compare(b, a) : compare(a, b);
  });
  body.append(...rows);
}

function filter() {
  const chosen = { task: document.querySelector("#task").value, hardware: document.querySelector("#hardware").value };
  document.querySelectorAll("[data-task]").forEach((element) => {
    element.hidden = Object.entries(chosen).some(([key, value]) => value && element.dataset[key] !== value);
  });
}

titles.forEach((title, index) => title.querySelector("button").addEventListener("click", () => sortBy(index)));
document.querySelectorAll(".filters select").forEach((select) => select.addEventListener("change", filter));
filter(); // a browser may keep a choice over a reload
