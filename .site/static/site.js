// What scrolls sideways can be scrolled by key.
function reachable() {
  for (const box of document.querySelectorAll("pre, .table-wrapper, .cell_output > *, div.math")) {
    if (box.scrollWidth > box.clientWidth) box.tabIndex = 0;
    else box.removeAttribute("tabindex");
  }
}
addEventListener("load", reachable);
addEventListener("resize", reachable);
