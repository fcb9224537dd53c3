// Before the page is painted, so that a chosen theme does not flash in the other one.
(() => {
  const theme = localStorage.getItem("bevatron.theme");
  if (theme === "light" || theme === "dark") document.documentElement.dataset.theme = theme;
})();
