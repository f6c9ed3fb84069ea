/* The first page of a visit: the map is drawn, zoomed and read before the application is there. What a hand did is kept here, in the address
 * for an application that has not asked for the page yet, and handed over when it has. */
(function () {
  "use strict";
  var HS = (window.headscope = window.headscope || {}), root = document.getElementById("first"), holder = document.getElementById("first-values");
  if (!root) return;
  var given = holder ? JSON.parse(holder.textContent) : {}, facts = given["viewer-facts"], host = root.querySelector(".viewer");
  var changed = {}, picked = null, looked = null, down = false, waiting = null;

  var first = (HS.first = { viewer: null, pictures: null, handOver: handOver, over: over, leave: leave, hang: hang });

  function now(name) { return changed[name] ? changed[name].value : given[name]; }

  /* The address of what is in sight, as the application would write it. */
  function address() {
    if (!facts || !given.usual) return;
    var place = picked || [given.token, given.key];
    window.dash_clientside.headscope.head_url(now("plane"), now("map-scale"), now("hide-sink"), looked || facts.window, given.series, given.colour, place[0], place[1], given.plan, given.pins, given.usual);
  }

  if (host && facts && facts.base) {
    first.viewer = HS.open(host, facts, {
      window: function (at) { looked = at; address(); },
      pick: function (query, key) { picked = [query, key]; address(); }
    });
    first.viewer.set(over({ plane: given.plane, scale: given["map-scale"], hidden: !!given["hide-sink"], planName: given.plan || "", lock: given.token >= 0 ? [given.token, given.key >= 0 ? given.key : -1] : null }));
    first.viewer.planNow = given.plan || "";
  }

  [["pictures", "picture-facts", "OneHead", "weights"], ["pictures-all", "all-facts", "AllHeads", "all"]].forEach(function (kind) {
    var place = root.querySelector('[data-id="' + kind[0] + '"]'), about = given[kind[1]];
    if (!place || !about) return;
    first.pictures = { id: kind[0], name: about[kind[3]], made: new HS.pictures[kind[2]](place, about) };
    if (first.pictures.made.show) first.pictures.made.show(Number(now("picture-frame") || 0), now("picture-scale") === "shared");
  });

  /* The pictures go on in the application's page. */
  function hang() {
    var early = first.pictures, place = early && document.getElementById(early.id);
    if (!place || place.childNodes.length) return;
    first.pictures = null;
    place.replaceChildren.apply(place, Array.prototype.slice.call(early.made.host.childNodes));
    early.made.host = place;
    if (early.made.resized) early.made.resized.observe(place);
    place.hsFacts = early.name;
    place.hsPictures = early.made;
  }

  /* What the application wants the viewer to show, and over it what was chosen here in the meantime. */
  function over(change) {
    if (changed.plane) change.plane = changed.plane.value;
    if (changed["map-scale"]) change.scale = changed["map-scale"].value;
    if (changed["hide-sink"]) change.hidden = changed["hide-sink"].value;
    if (picked) change.lock = picked;
    return change;
  }

  root.addEventListener("input", function (event) {
    var at = event.target, name = at.dataset.first;
    if (!name) return;
    changed[name] = at.type === "checkbox" ? { prop: "checked", value: at.checked } : { prop: "value", value: at.value };
    if (at.type === "radio") at.closest(".st-segments").querySelectorAll("label").forEach(function (label) { label.classList.toggle("st-on", label.contains(at)); });
    if (first.viewer) { first.viewer.set(over({})); address(); }
    if (first.pictures && first.pictures.made.show) first.pictures.made.show(Number(now("picture-frame") || 0), now("picture-scale") === "shared");
  });

  root.addEventListener("click", function (event) {
    if (!event.target.closest("[data-scheme]")) return;
    var scheme = document.documentElement.getAttribute("data-mantine-color-scheme") === "dark" ? "light" : "dark";
    try { localStorage.setItem("mantine-color-scheme-value", scheme); } catch (error) { /* a browser that keeps nothing */ }
    document.documentElement.setAttribute("data-mantine-color-scheme", scheme);
    changed["scheme-now"] = { prop: "data", value: scheme };
  });

  root.addEventListener("pointerdown", function () { down = true; });
  ["pointerup", "pointercancel"].forEach(function (name) {
    window.addEventListener(name, function () {
      down = false;
      if (waiting) setTimeout(function () { var act = waiting; waiting = null; if (act) finish(act); }, 0);
    });
  });

  /* The application is there: `act` makes its page show what this one shows. Never under a pressed button. */
  function handOver(act) {
    if (down) waiting = act;
    else finish(act);
  }

  function finish(act) {
    act();
    leave();
  }

  function leave() {
    if (HS.first !== first) return;
    HS.first = null;
    hang();
    var set = window.dash_clientside.set_props, scroll = [window.scrollX, window.scrollY], active = document.activeElement;
    var focus = active && root.contains(active) ? active.dataset.first || (active.closest("[data-id]") || { dataset: {} }).dataset.id : "";
    root.remove();
    document.body.classList.remove("first-visit");
    window.scrollTo(scroll[0], scroll[1]);
    if (focus && document.getElementById(focus)) document.getElementById(focus).focus({ preventScroll: true });
    Object.keys(changed).forEach(function (name) {
      var change = {};
      change[changed[name].prop] = changed[name].value;
      if (document.getElementById(name) || name === "scheme-now") set(name, change);
    });
    if (looked) set("map-window", { data: looked });
    if (picked) { set("token", { data: picked[0] }); set("key", { data: picked[1] }); }
    performance.mark("headscope-application");
  }
})();
