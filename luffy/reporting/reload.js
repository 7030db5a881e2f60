// Of a page that is served while a run trains: itself as it is now, once the server has one.
setInterval(async () => {
  if (document.hidden) return;
  const found = await fetch("/", {method: "HEAD"}).catch(() => null);
  if (found?.ok) location.reload();
}, REFRESH_MS);
