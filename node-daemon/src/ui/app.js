// Fetches the same page again: every few seconds, and while somebody types. Without it everything is there, too.
"use strict";

(() => {
  const INTERVAL = 5000;
  const TYPING = 200;
  const part = document.getElementById("part");
  const lost = document.getElementById("lost");
  const shut = document.getElementById("shut");
  let timer;
  let asked = 0;

  const search = () => document.getElementById("search");

  async function renew() {
    const now = ++asked;
    const field = search();
    const wanted = field ? field.value : "";
    try {
      const answer = await fetch("/part?q=" + encodeURIComponent(wanted), { cache: "no-store" });
      // It answers, and wants another key than ours by now: asking on is in vain.
      if (answer.status === 401) return tell(shut);
      if (!answer.ok) throw new Error(String(answer.status));
      const text = await answer.text();
      // A later question was asked meanwhile.
      if (now !== asked) return;
      replace(text);
      tell(null);
    } catch {
      if (now === asked) tell(lost);
    }
    later(INTERVAL);
  }

  // Says what is wrong: at most one thing.
  function tell(what) {
    for (const banner of [lost, shut]) banner.hidden = banner !== what;
  }

  // What stands there was escaped by the daemon. The field keeps its cursor and what was typed since.
  function replace(text) {
    const before = search();
    const typed = before && { value: before.value, start: before.selectionStart, end: before.selectionEnd };
    const focused = document.activeElement === before;
    part.innerHTML = text;
    const after = search();
    if (!typed || !after) return;
    after.value = typed.value;
    if (focused) {
      after.focus({ preventScroll: true });
      after.setSelectionRange(typed.start, typed.end);
    }
  }

  function later(milliseconds) {
    clearTimeout(timer);
    timer = setTimeout(() => (document.hidden ? later(INTERVAL) : renew()), milliseconds);
  }

  document.addEventListener("input", (event) => {
    if (event.target === search()) later(TYPING);
  });
  document.addEventListener("submit", (event) => {
    event.preventDefault();
    renew();
  });
  later(INTERVAL);
})();
