// SPDX-License-Identifier: Apache-2.0
// The client: three requests are in flight all the time, each on a connection
// that is kept. It prints "round N" for each entry that the server has.
'use strict';
const { createHash } = require('node:crypto');
const http = require('node:http');

function fail(why) {
  console.log('failed: client:', why);
  process.exit(1);
}
process.on('uncaughtException', fail);
process.on('unhandledRejection', fail);
process.on('disconnect', () => process.exit(0)); // its server stops

const agent = new http.Agent({ keepAlive: true, maxSockets: 3 });

// ask sends a request and returns the answer, a stream.
function ask(path, body = '') {
  return new Promise((done, failed) => {
    http.request({ agent, host: '127.0.0.1', port: 8080, method: 'POST', path }, done).on('error', failed).end(body);
  });
}

async function text(answer) {
  let all = '';
  for await (const part of answer) all += part;
  return all;
}

async function append() {
  let want = '';
  for (let n = 1; ; n++) {
    const entry = `this is entry ${n}`;
    want = createHash('sha256').update(want).update(entry).digest('hex');
    const have = await text(await ask('/append', entry));
    if (have !== want) fail(`entry ${n}: the digest is ${have}, not ${want}`);
    console.log(`round ${n}`);
  }
}

async function wait() {
  for (;;) console.log('signal', await text(await ask('/wait')));
}

async function ticks() {
  let n = 0;
  let rest = '';
  for await (const part of await ask('/ticks')) {
    const lines = (rest + part).split('\n');
    rest = lines.pop();
    for (const line of lines) if (line !== String(++n)) fail(`tick ${n} is ${line}`);
  }
  fail('the ticks have ended');
}

append();
wait();
ticks();
