/* A library that few pages use is loaded by the first of them: its place in the window is kept by a component that waits for it. */
(function () {
  "use strict";
  var GRID = "dash_ag_grid", script = document.querySelector('script[type="headscope/spare"][src*="/' + GRID + '/"]'), loading = null, real = null;
  if (!script) return;

  function load() {
    if (!loading) loading = new Promise(function (done, failed) {
      var made = document.createElement("script");
      made.src = script.getAttribute("src");
      made.onload = function () { real = window[GRID]; window[GRID] = Object.assign({}, real, { AgGrid: AgGrid }); done(); };
      made.onerror = failed;
      document.body.appendChild(made);
    });
    return loading;
  }

  function AgGrid(props) {
    var React = window.React, there = React.useState(!!real);
    React.useEffect(function () { if (!real) load().then(function () { there[1](true); }); }, []);
    return real ? React.createElement(real.AgGrid, props) : null;
  }
  AgGrid.dashRenderType = true;
  Object.defineProperty(AgGrid, "_dashprivate_isLazyComponentReady", { get: function () { return real ? real.AgGrid._dashprivate_isLazyComponentReady : load().then(function () { return real.AgGrid._dashprivate_isLazyComponentReady; }); } });
  window[GRID] = { AgGrid: AgGrid };
})();
