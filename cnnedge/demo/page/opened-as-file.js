// Browsers load no modules from a file that was opened by a double click: say what to do instead.
if (location.protocol === "file:") {
  const problem = document.getElementById("problem");
  problem.textContent =
    "This page has to come from a web server. In its folder, run: python -m http.server";
  problem.hidden = false;
  document.getElementById("backend-note").textContent = "Not running";
  document.getElementById("loading").hidden = true;
  document.getElementById("best").textContent = "";
}
