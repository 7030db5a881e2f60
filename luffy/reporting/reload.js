// Of a page that is served while a run trains: itself as it is now, once the server has one.
const ask = async () => {
  const found = document.hidden ? null : await fetch("/", {method: "HEAD"}).catch(() => null);
  if (found?.ok) location.reload();
  else setTimeout(ask, REFRESH_MS);
};
setTimeout(ask, REFRESH_MS);
