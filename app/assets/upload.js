/* Taking in a run: a zip, sent as it is; what the server says of it is shown as it says it. */
(function () {
  "use strict";

  function say(text, wrong) {
    var note = document.getElementById("upload-note");
    if (!note) return;
    note.textContent = text;
    note.className = wrong ? "find-note warning-line" : "find-note muted";
  }

  function send(file) {
    var box = document.getElementById("upload");
    if (!box || !file) return;
    if (!/\.zip$/i.test(file.name)) { say("Choose a .zip of a run directory.", true); return; }
    if (file.size > Number(box.dataset.limit)) { say("It is larger than " + Math.round(Number(box.dataset.limit) / 1048576) + " MiB: copy the run into the runs directory instead.", true); return; }
    say("Reading " + file.name + " …", false);
    fetch(box.dataset.url + "?name=" + encodeURIComponent(file.name), { method: "POST", body: file, headers: { "Content-Type": "application/zip" }, credentials: "same-origin" })
      .then(function (answer) { return answer.text().then(function (text) { return { ok: answer.ok, text: text }; }); })
      .then(function (got) {
        if (!got.ok) { say(got.text.trim(), true); return; }
        window.dash_clientside.set_props("nav", { href: JSON.parse(got.text).url });
      })
      .catch(function () { say("The server could not be reached.", true); });
  }

  document.addEventListener("click", function (event) {
    if (!event.target.closest || !event.target.closest("#upload-button")) return;
    var input = document.createElement("input");
    input.type = "file";
    input.accept = ".zip,application/zip";
    input.onchange = function () { send(input.files[0]); };
    input.click();
  });
  ["dragover", "drop"].forEach(function (name) {
    document.addEventListener(name, function (event) {
      if (!document.getElementById("upload") || !event.dataTransfer || Array.prototype.indexOf.call(event.dataTransfer.types, "Files") < 0) return;
      event.preventDefault();
      if (name === "drop") send(event.dataTransfer.files[0]);
    });
  });

  Object.assign(window.dash_clientside.headscope, {
    pick_runs: function (a, b) {
      var prefix = window.location.pathname.replace(/\/$/, "");
      return prefix + "/compare?a=" + encodeURIComponent(a || "") + "&b=" + encodeURIComponent(b || "");
    }
  });
})();
