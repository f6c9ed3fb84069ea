/* Loads the application after the first page: one script after the other, each in a task of its own, and none while a hand is moving. */
(function () {
  "use strict";
  var HS = window.headscope, STILL = 220, PATIENCE = 2500, FIRST = 1200, GIVE_UP = 12000;
  var later = Array.prototype.slice.call(document.querySelectorAll('script[type="headscope/later"]')), moved = -1e9, waited = 0, entry = document.getElementById("react-entry-point");

  ["wheel", "pointerdown", "keydown", "input"].forEach(function (name) {
    window.addEventListener(name, function () { moved = performance.now(); }, { passive: true, capture: true });
  });
  window.addEventListener("pointermove", function (event) { if (event.buttons) moved = performance.now(); }, { passive: true, capture: true });

  /* Does `act` when no hand has moved for a while, or as soon as `frame` is in sight. */
  HS.quiet = function (frame, act) {
    var seen = new IntersectionObserver(function (entries) { if (entries.some(function (one) { return one.isIntersecting; })) go(); }), done = false;
    function go() {
      if (done) return;
      done = true;
      seen.disconnect();
      act();
    }
    (function look() {
      if (done) return;
      if (!HS.first && performance.now() - moved > 3 * STILL) (window.requestIdleCallback || setTimeout)(go, { timeout: 600 });
      else setTimeout(look, 120);
    })();
    seen.observe(frame);
  };

  function hint(script) {
    var link = document.createElement("link");
    link.rel = "preload";
    link.as = "script";
    link.href = script.getAttribute("src");
    document.head.appendChild(link);
  }

  function next() {
    if (performance.now() - moved < STILL && waited < PATIENCE) { waited += 50; setTimeout(next, 50); return; }
    var script = later.shift(), made = document.createElement("script");
    if (!script) { watch(); return; }
    if (!script.hasAttribute("src")) { made.textContent = script.textContent; document.body.appendChild(made); next(); return; }
    made.async = false;
    made.src = script.getAttribute("src");
    made.onload = function () { setTimeout(next, 0); };
    made.onerror = function () { say("A script of the dashboard could not be loaded. Reload the page; if that does not help, is the server still running?"); };
    document.body.appendChild(made);
  }

  function say(text) {
    var notice = document.querySelector("#first .notice");
    if (notice) notice.textContent = text;
  }

  /* A page with a map takes over by itself, when it has its viewer (viewer/6-page.js); any other one as soon as it is drawn. */
  function watch() {
    var began = performance.now();
    (function look() {
      if (!HS.first) return;
      var drawn = entry.querySelector(".page h1"), map = entry.querySelector("#viewer"), waited = performance.now() - began;
      if ((drawn && !map) || waited > GIVE_UP) HS.first.handOver(function () {});
      else setTimeout(look, 30);
    })();
  }

  function start() {
    performance.mark("headscope-first-page");
    later.forEach(function (script) { if (script.hasAttribute("src")) hint(script); });
    next();
  }

  /* When the map is sharp and on the screen, and where there is none after the first frame. */
  (function ready() {
    var viewer = HS.first && HS.first.viewer;
    if (viewer && !viewer.stats.sharp && performance.now() < FIRST) setTimeout(ready, 16);
    else requestAnimationFrame(function () { setTimeout(start, 0); });
  })();
})();
