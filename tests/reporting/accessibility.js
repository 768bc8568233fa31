// What a page must not do to its readers; returns sentences. Runs inside the page, needs nothing.
(() => {
  const faults = [];
  const say = (element, text) => faults.push(`${text}: <${element.tagName.toLowerCase()}> ${(element.textContent || "").trim().slice(0, 40)}`);
  const shown = (element) => element.checkVisibility() && element.getClientRects().length > 0;
  if (!document.documentElement.lang) faults.push("the page has no language");
  if (!document.title) faults.push("the page has no title");
  if (document.querySelectorAll("main").length !== 1) faults.push("the page has not exactly one main part");
  if (document.querySelectorAll("h1").length !== 1) faults.push("the page has not exactly one h1");
  let level = 0;
  for (const heading of document.querySelectorAll("h1,h2,h3,h4")) {
    const next = Number(heading.tagName[1]);
    if (next > level + 1) say(heading, `heading jumps from level ${level} to ${next}`);
    level = next;
  }
  const ids = new Set();
  for (const element of document.querySelectorAll("[id]")) {
    if (ids.has(element.id)) say(element, `id ${element.id} is there twice`);
    ids.add(element.id);
  }
  for (const element of document.querySelectorAll("[role=img],[role=region]"))
    if (!element.getAttribute("aria-label")) say(element, "no label");
  for (const element of document.querySelectorAll("img")) if (!element.alt) say(element, "no alt text");
  for (const element of document.querySelectorAll("th")) if (!element.scope) say(element, "header cell without scope");
  for (const element of document.querySelectorAll("a,button,summary")) if (!element.textContent.trim()) say(element, "no name");
  for (const element of document.querySelectorAll("*"))
    if (shown(element) && element.scrollWidth > element.clientWidth + 1 && ["auto", "scroll"].includes(getComputedStyle(element).overflowX) && element.tabIndex < 0)
      say(element, "scrolls but cannot be reached by keyboard");

  const canvas = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
  const rgba = (color) => {
    canvas.clearRect(0, 0, 1, 1);
    canvas.fillStyle = color;
    canvas.fillRect(0, 0, 1, 1);
    return [...canvas.getImageData(0, 0, 1, 1).data];
  };
  const luminance = (c) => {
    const [r, g, b] = c.slice(0, 3).map((v) => (v /= 255) <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const contrast = (a, b) => {
    const [x, y] = [luminance(a), luminance(b)].sort((p, q) => q - p);
    return (x + 0.05) / (y + 0.05);
  };
  const background = (element) => {
    for (let node = element; node; node = node.parentElement) {
      const color = rgba(getComputedStyle(node).backgroundColor);
      if (color[3] === 255) return color;
    }
    return [255, 255, 255, 255];
  };
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const element = walker.currentNode.parentElement;
    if (!walker.currentNode.data.trim() || !shown(element) || element.closest(".hidden,.skip,style,script,#figure-error-map svg,#figure-change-map svg")) continue;
    const style = getComputedStyle(element);
    const color = rgba(element.closest("svg") ? style.fill : style.color);
    const large = parseFloat(style.fontSize) >= 24 || (parseFloat(style.fontSize) >= 18.66 && Number(style.fontWeight) >= 700);
    const ratio = contrast(color, background(element));
    if (ratio < (large ? 3 : 4.5)) say(element, `contrast ${ratio.toFixed(2)}`);
  }
  return faults;
})();
