// The size of the Jacobian, and the method that it leaves.
const form = document.querySelector("form.size");
const output = form.querySelector("output");
const page = "auto_examples/compute/choosing_a_method.html#memory-with-chunk-size";

function answer() {
  if (!form.checkValidity()) {
    return "N, C and P are whole numbers from 1 on, and memory is more than 0 GB.";
  }
  const field = (name) => Number(form.elements[name].value);
  const size = (field("N") * field("C") * field("P") * field("bytes")) / 1e9;
  const shown = Number(size.toPrecision(3)).toLocaleString("en", { maximumSignificantDigits: 3 });
  if (2 * size <= field("memory")) return `J takes ${shown} GB and fits: take vmap(jacrev).`;
  const chunks = `<a href="${page}">chunks</a>`;
  return size <= field("memory")
    ? `J takes ${shown} GB and fits once: write ${chunks} into memory that you allocate first.`
    : `J takes ${shown} GB and does not fit: compute ${chunks}, use each and drop it.`;
}

const show = () => { output.innerHTML = answer(); };
form.addEventListener("input", show);
form.addEventListener("submit", (event) => event.preventDefault());
form.hidden = false;
show();
