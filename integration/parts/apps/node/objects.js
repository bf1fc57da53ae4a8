// SPDX-License-Identifier: Apache-2.0
// A thread with objects, which it changes and checks. They are garbage collected
// all the time.
'use strict';
const { createHash } = require('node:crypto');
const { parentPort } = require('node:worker_threads');

const objects = new Map();
const digest = (data) => createHash('md5').update(data).digest('hex');
let n = 0;

const timer = setInterval(() => {
  for (let i = 0; i < 20; i++, n++) {
    const data = `object ${n} `.repeat(100 + (n % 100));
    objects.set(n % 1000, { data, sum: digest(data) });
  }
  for (const [key, object] of objects) {
    if (digest(object.data) !== object.sum) throw new Error(`object ${key} is not what it was`);
  }
}, 20);
parentPort.on('message', () => {
  clearInterval(timer);
  parentPort.close();
});
