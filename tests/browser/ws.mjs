// Prints the frames of a socket of the package `ws`, then its close code. Arguments: URL, key, subscribe or nothing.
import WebSocket from "ws";

const [url, key, subscribe] = process.argv.slice(2);
const socket = new WebSocket(url, subscribe ? ["jobs.v1"] : [], { headers: { Authorization: `Bearer ${key}` } });
socket.on("open", () => subscribe && socket.send(subscribe));
socket.on("message", (frame) => {
  console.log(String(frame));
  // On /ws/v1 the end of a job does not end the socket.
  if (subscribe && String(frame).includes('"bye"')) socket.close(1000);
});
socket.on("close", (code) => console.log(code));
