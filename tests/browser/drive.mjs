// Drives a browser for the tests: commands come as lines of JSON on standard input, answers go to standard output.
import { createInterface } from "node:readline";
import puppeteer from "puppeteer-core";

const [browser, executablePath] = process.argv.slice(2);
const CHROMIUM = [
  "--no-sandbox",
  "--disable-dev-shm-usage",
  "--disable-gpu",
  "--disable-quic",
  "--no-first-run",
  "--disable-background-networking",
  "--disable-component-update",
  "--disable-sync",
];
const running = await puppeteer.launch({
  browser,
  executablePath,
  args: browser === "chrome" ? CHROMIUM : [],
  // The tests end the browser, also while it is stopped.
  handleSIGINT: false,
  handleSIGTERM: false,
});
const pages = new Map();
const complaints = [];

const actions = {
  async open({ page, url }) {
    const opened = await running.newPage();
    await opened.setViewport({ width: 900, height: 700 });
    opened.on("pageerror", (error) => complaints.push(String(error)));
    opened.on("console", (message) => message.type() === "error" && complaints.push(message.text()));
    await opened.goto(url);
    pages.set(page, opened);
  },
  run: ({ page, script }) => pages.get(page).evaluate(script),
  screenshot: ({ page, path }) => pages.get(page).screenshot({ path }).then(() => null),
  async shut({ page }) {
    await pages.get(page).close();
    pages.delete(page);
    return complaints.splice(0);
  },
  pid: () => running.process().pid,
  quit: () => running.close(),
};

// A script that never ends is a failed test, not one that hangs.
function late() {
  return new Promise((_, reject) => setTimeout(reject, 30_000, new Error(`not done after 30 s`)).unref());
}

for await (const line of createInterface({ input: process.stdin })) {
  const command = JSON.parse(line);
  let answer;
  try {
    answer = { value: (await Promise.race([actions[command.do](command), late()])) ?? null };
  } catch (error) {
    answer = { error: String(error?.stack ?? error) };
  }
  process.stdout.write(JSON.stringify(answer) + "\n");
  if (command.do === "quit") process.exit();
}
await running.close();
