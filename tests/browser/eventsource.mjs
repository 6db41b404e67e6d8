// Prints the events of the package `eventsource` until it is closed for good. Arguments: URL, key.
import { EventSource } from "eventsource";

const [url, key] = process.argv.slice(2);
const source = new EventSource(url, {
  fetch: (to, init) => fetch(to, { ...init, headers: { ...init.headers, Authorization: `Bearer ${key}` } }),
});
for (const type of ["snapshot", "state", "progress", "log", "bye"]) {
  source.addEventListener(type, (event) => console.log(event.data));
}
source.onerror = () => source.readyState === EventSource.CLOSED && console.log("closed");
