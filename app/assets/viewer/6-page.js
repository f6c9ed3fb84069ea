/* The viewer on a page of Dash: it is made when its facts arrive, follows the controls, and tells the stores where it looks. */
(function () {
  "use strict";
  var HS = window.headscope, NO = function () { return window.dash_clientside.no_update; };

  function viewers() { return Array.prototype.slice.call(document.querySelectorAll(".viewer")).map(function (host) { return host.hsViewer; }).filter(Boolean); }

  function badge(host, words) {
    var first = host.closest("#first"), name = host.dataset.badge || "map-badge", place = first ? first.querySelector('[data-id="' + name + '"]') : document.getElementById(name);
    if (!place || place.drawn === words.join("|")) return;
    place.drawn = words.join("|");
    place.replaceChildren.apply(place, words.map(function (word, at) {
      var tag = document.createElement("span");
      tag.className = "tag" + (at ? "" : " tag-strong");
      tag.textContent = word;
      return tag;
    }));
  }

  /* Makes (or keeps) the viewer of a place on the page; the one of the first page goes on where it is. */
  HS.open = function (host, facts, tell) {
    var name = facts.base + "@" + facts.version, all = Object.assign({ badge: function (words) { badge(host, words); } }, tell), early = HS.first && HS.first.viewer;
    if (!host.hsViewer && early && early.name === name) {
      HS.first.viewer = null;
      early.tell = all;
      early.moveTo(host);
    } else if (!host.hsViewer || host.hsViewer.name !== name) {
      if (host.hsViewer) host.hsViewer.close();
      host.hsViewer = new HS.Viewer(host, facts, all);
      host.hsViewer.name = name;
    }
    return host.hsViewer;
  };

  Object.assign(window.dash_clientside.headscope, {
    viewer: function (facts, plane, scale, hidden, plan, token, key) {
      var host = document.getElementById("viewer");
      if (!host || !facts) return "";
      var show = function () {
        var change = { plane: plane, scale: scale, hidden: !!hidden, lock: token >= 0 ? [token, key >= 0 ? key : -1] : null }, made;
        if (HS.first) change = HS.first.over(change);
        if (facts.base) made = HS.open(host, facts, {
          window: function (at) { window.dash_clientside.set_props("map-window", { data: at }); },
          pick: function (query, at) {
            window.dash_clientside.set_props("token", { data: query });
            window.dash_clientside.set_props("key", { data: at });
          }
        });
        if (made && (made.planNow || "") !== (plan || "")) { made.planNow = plan || ""; change.planName = plan || ""; }
        if (made) made.set(change);
      };
      if (HS.first) HS.first.handOver(show);
      else show();
      return "";
    },

    /* The maps of one head in two runs: they move together where their texts have the same length. */
    pair: function (facts, plane, scale, hidden, head) {
      var hosts = { a: document.getElementById("viewer-a"), b: document.getElementById("viewer-b") };
      if (!facts) return NO();
      ["a", "b"].forEach(function (side) {
        var other = side === "a" ? "b" : "a";
        if (!hosts[side] || !facts[side]) return;
        HS.open(hosts[side], facts[side], {
          window: function () {}, pick: function () {},
          moved: function (view) { if (facts.linked && hosts[other] && hosts[other].hsViewer) hosts[other].hsViewer.follow(view); }
        }).set({ plane: plane, scale: scale, hidden: !!hidden });
      });
      return "";
    },

    compare_url: function (a, b) {
      var now = new URLSearchParams(window.location.search), metric = now.get("metric");
      if (!a || !b || (now.get("a") === a && now.get("b") === b)) return NO();
      return window.location.pathname + "?a=" + encodeURIComponent(a) + "&b=" + encodeURIComponent(b) + (metric ? "&metric=" + encodeURIComponent(metric) : "");
    },

    compare_metric: function (metric, runs) {
      var now = new URLSearchParams(window.location.search);
      if (!metric || now.get("metric") === metric) return NO();
      now.set("metric", metric);
      now.delete("head");
      return window.location.pathname + "?" + now.toString();
    },

    compare_head: function () {
      var trigger = window.dash_clientside.callback_context.triggered[0] || {}, point = trigger.value && trigger.value.points[0];
      if (!point) return NO();
      var name = point.customdata ? point.customdata.join(".") : Math.round(point.x) + "." + Math.round(point.y);
      keepHead(name);
      return name;
    }
  });

  function keepHead(name) {
    var now = new URLSearchParams(window.location.search);
    now.set("head", name);
    window.history.replaceState(window.history.state, "", window.location.pathname + "?" + now.toString());
  }

  var DOES = {
    in: function (viewer) { viewer.zoom(0.5, viewer.box.x + viewer.box.used / 2, viewer.box.y + viewer.box.h / 2); },
    out: function (viewer) { viewer.zoom(2, viewer.box.x + viewer.box.used / 2, viewer.box.y + viewer.box.h / 2); },
    all: function (viewer) { viewer.fit([]); },
    exact: function (viewer) {
      var view = viewer.view, at = viewer.lock && viewer.lock[1] >= 0 ? viewer.lock : null;
      var middle = view.q + (viewer.box.h / 2) * view.s;
      viewer.near(at ? at[0] : middle, at ? at[1] : Math.min(view.k + (viewer.box.used / 2) * view.s, middle));
    },
    png: function (viewer) { HS.save(viewer, "png"); },
    svg: function (viewer) { HS.save(viewer, "svg"); },
    json: function (viewer) { HS.save(viewer, "json"); }
  };

  document.addEventListener("click", function (event) {
    var at = event.target.closest && event.target.closest("[data-viewer], [data-goto], [data-pair]");
    if (!at) return;
    if (at.dataset.pair) {
      keepHead(at.dataset.pair);
      if (HS.first) return;
      window.dash_clientside.set_props("compare-head", { data: at.dataset.pair });
      document.querySelector(".pair-panel").scrollIntoView({ block: "nearest" });
      return;
    }
    if (at.dataset.viewer) viewers().forEach(function (viewer) { DOES[at.dataset.viewer](viewer); });
    else {
      var place = at.dataset.goto.split(".").map(Number), one = viewers()[0];
      if (!one) return;
      one.near(place[0], place[1]);
      one.lock = place;
      one.tell.pick(place[0], place[1]);
      one.host.scrollIntoView({ block: "nearest" });
    }
  });

  new MutationObserver(function () { viewers().forEach(function (viewer) { viewer.schedule(); }); })
    .observe(document.documentElement, { attributes: true, attributeFilter: ["data-mantine-color-scheme"] });

  HS.viewers = viewers;
})();
