// The size of the Jacobian, and the method that it leaves.
const form = document.querySelector("form.size");
const output = form.querySelector("output");
const link = (page, text) => `<a href="auto_examples/scale/${page}"><u>${text}</u></a>`;
const grads = link("../compute/torch_func_jacobians.html#the-whole-batch-at-once-jacrev-autograd-grad-jacobian", "is_grads_batched");
const batched = link("universal_jacobian.html#shortest-use", "batched_jacobian");
const chunks = link("jacobians_without_memory.html#chunks-of-samples-and-outputs", "chunks");
const products = link("jacobians_without_memory.html#products-with-j-and-its-transpose", "products");
const factors = link("neural_tangent_kernel.html#kernel-of-two-batches", "factors");
const measure = link("jacobians_without_memory.html#memory-plan", "measure");
const pieces = `${chunks} (rows on disk, sums over J), ${products} (J v, J^T u) or ${factors} (J J^T)`;

// Of the memory; the rest holds the model, the batch and other programs.
const USABLE = 0.9;
// Peaks that were measured, in sizes of J: of the method that is named for this kind of
// model, and of batched_jacobian with out=, which needs more than that for the others.
const PEAKS = { linear: [2, 1], other: [2.1, Infinity] };
const METHODS = { linear: `vmap(jacrev) or ${batched}`, other: "vmap(jacrev) with chunk_size=10" };
const UNITS = ["bytes", "kB", "MB", "GB", "TB", "PB", "EB", "ZB", "YB"];
const SUFFIXES = { "": 1, k: 1e3, m: 1e6, g: 1e9, b: 1e9, t: 1e12 };

// 269322, 269,322, 1e6, 25k and 11.7M are sizes; anything else is NaN.
function number(text) {
  const [, digits, suffix] =
    /^(\d+(?:\.\d*)?(?:e\+?\d+)?)\s*([kmgbt]?)$/i.exec(text.trim().replace(/[ ,_](?=\d{3}(?!\d))/g, "")) || [];
  return digits ? Number(digits) * SUFFIXES[suffix.toLowerCase()] : NaN;
}

// 25.3 * 1e3 is a whole number, but for rounding.
const whole = (value) => value >= 1 && value < 1e30 && Math.abs(value - Math.round(value)) < 1e-9 * value;

function shown(bytes) {
  let unit = 0;
  for (; bytes >= 999.5 && unit < UNITS.length - 1; unit++) bytes /= 1000;
  return `${Number(bytes.toPrecision(3))} ${UNITS[unit]}`;
}

function answer() {
  const value = Object.fromEntries([...new FormData(form)].map(([name, text]) => [name, number(text)]));
  const wrong = ["N", "C", "P"].filter((name) => !whole(value[name]));
  const limit = USABLE * value.memory * 1e9;
  if (!(limit > 0 && limit < 1e30)) wrong.push("memory");
  for (const field of form.querySelectorAll("input")) {
    field.setAttribute("aria-invalid", wrong.includes(field.name));
  }
  if (wrong.length) {
    return wrong[0] === "memory"
      ? "Memory is no number above 0: write 16 or 0.5."
      : `${wrong[0]} is no whole number from 1 on: write 25000, 25k, 11.7M or 1e6.`;
  }
  const size = value.N * value.C * value.P * value.bytes;
  const kind = form.elements.kind.value;
  const [made, written] = PEAKS[kind];
  const takes = `J takes ${shown(size)} and`;
  const peak = `${shown(made * size)} at the peak${kind === "other" ? ", and the layers' outputs for ten samples" : ""}`;
  const method = value.N * value.C <= 10 ? grads : METHODS[kind];
  if (made * size <= limit) return `${takes} fits, with about ${peak}: take ${method}. With few weights or large images, ${measure}.`;
  if (written * size <= limit) return `${takes} fits once: allocate it first, then write into it with ${batched} and out=, or in ${chunks}.`;
  return size <= limit
    ? `${takes} fits once, but not what a method needs beside it: allocate it first, then write into it in ${chunks}.`
    : `${takes} does not fit into ${100 * USABLE} % of the memory: compute ${pieces}, never all of it.`;
}

const show = () => { output.innerHTML = answer(); };
form.addEventListener("input", show);
form.addEventListener("submit", (event) => event.preventDefault());
// On the way back the browser fills in what was there, after this script has run.
window.addEventListener("pageshow", show);
form.hidden = false;
show();
