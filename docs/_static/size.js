// The size of the Jacobian, and the method that it leaves.
const form = document.querySelector("form.size");
const output = form.querySelector("output");
const link = (page, text) => `<a href="auto_examples/scale/${page}"><u>${text}</u></a>`;
const batched = link("universal_jacobian.html#the-function", "batched_jacobian");
const chunks = link("jacobians_without_memory.html#chunks-of-samples-and-outputs", "chunks");
const pieces = link("jacobians_without_memory.html", "chunks, products or factors");

function answer() {
  if (!form.checkValidity()) {
    return "N, C and P are whole numbers from 1 on, and memory is more than 0 GB.";
  }
  const field = (name) => Number(form.elements[name].value);
  const size = (field("N") * field("C") * field("P") * field("bytes")) / 1e9;
  const shown = Number(size.toPrecision(3)).toLocaleString("en", { maximumSignificantDigits: 3 });
  const takes = `J takes ${shown} GB and`;
  if (2 * size <= field("memory")) return `${takes} fits: take vmap(jacrev) or ${batched}.`;
  return size <= field("memory")
    ? `${takes} fits once: allocate it first, then write into it with ${batched} and out=, or in ${chunks}.`
    : `${takes} does not fit: compute its ${pieces}, never all of it.`;
}

const show = () => { output.innerHTML = answer(); };
form.addEventListener("input", show);
form.addEventListener("submit", (event) => event.preventDefault());
form.hidden = false;
show();
