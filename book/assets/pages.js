// Small services to a reader's hands: what a link means is opened, sliders and menus of
// plotly figures answer to the keyboard, and what scrolls sideways can be reached.
(() => {
  "use strict";

  const open = () => {
    const id = decodeURIComponent(location.hash.slice(1));
    const target = id && document.getElementById(id);
    if (!target) return;
    let shut = false;
    for (let el = target; el; el = el.parentElement)
      if (el.matches("details:not([open])")) el.open = shut = true;
    if (shut) target.scrollIntoView();
  };

  // A plotly slider is drawn, so that no key reaches it. Beside the figure goes a slider
  // of the browser's own, seen while it has the focus.
  const labelled = (name, control) => {
    const label = document.createElement("label");
    label.append(name + " ", control);
    return label;
  };
  const perform = (figure, step) =>
    step.method !== "skip" && Plotly[step.method](figure, ...(step.args ?? []));
  const plain = text => (text ?? "").replace(/<[^>]*>|\$/g, "").trim();

  const slider = (figure, layout, index) => {
    const input = document.createElement("input");
    const name = plain(layout.currentvalue?.prefix).replace(/[:=]\s*$/, "") || "Slider";
    const say = () =>
      input.setAttribute("aria-valuetext", plain(layout.steps[input.value].label));
    Object.assign(input, {type: "range", min: 0, max: layout.steps.length - 1,
      value: layout.active ?? 0});
    say();
    input.addEventListener("input", () => {
      const active = Number(input.value);
      say();
      perform(figure, layout.steps[active]);
      Plotly.relayout(figure, {[`sliders[${index}].active`]: active});
    });
    figure.on("plotly_sliderchange", event => {
      if (event.slider._index !== index) return;
      input.value = event.slider.active;
      say();
    });
    return labelled(name, input);
  };

  const menu = (figure, layout, index) => {
    const select = document.createElement("select");
    layout.buttons.forEach((button, i) =>
      select.add(new Option(plain(button.label), i)));
    select.value = layout.active ?? 0;
    select.addEventListener("change", () => {
      const active = Number(select.value);
      perform(figure, layout.buttons[active]);
      Plotly.relayout(figure, {[`updatemenus[${index}].active`]: active});
    });
    return labelled("Choose", select);
  };

  const hands = figure => {
    const box = document.createElement("div");
    box.className = "ngd-keys";
    const {sliders = [], updatemenus = []} = figure._fullLayout ?? {};
    updatemenus.forEach((layout, i) => layout.visible !== false &&
      box.append(menu(figure, layout, i)));
    sliders.forEach((layout, i) => layout.visible !== false &&
      box.append(slider(figure, layout, i)));
    if (box.children.length)
      (figure.closest(".ngd-interactive") ?? figure).after(box);
  };

  const reachable = () => {
    const wide = "div.highlight pre, .ngd-table, .pst-scrollable-table-container, " +
      "div.cell_output .output, article mjx-container[display='true']";
    for (const box of document.querySelectorAll(wide))
      if (box.scrollWidth > box.clientWidth + 1) box.tabIndex = 0;
      else if (box.tabIndex === 0) box.removeAttribute("tabindex");
  };

  const start = async () => {
    open();
    document.querySelectorAll(".js-plotly-plot").forEach(hands);
    await window.MathJax?.startup?.promise;
    reachable();
    addEventListener("resize", reachable);
  };
  addEventListener("hashchange", open);
  if (document.readyState === "complete") start();
  else addEventListener("load", start);
})();
