// SPDX-License-Identifier: Apache-2.0
import java.util.ArrayList;
import java.util.List;
import java.util.Random;
import java.util.concurrent.CyclicBarrier;
import java.util.concurrent.atomic.AtomicLong;
import java.util.zip.CRC32;

import sun.misc.Signal;

/**
 * Threads that change a heap of small and large objects and check what the
 * others have made of it. It is garbage collected all the time.
 */
public class Heap {
    static final int THREADS = 4;
    static final int CELLS = 1000;

    /** Bytes with their checksum. */
    record Cell(byte[] data, long sum) {
        static Cell of(Random random) {
            byte[] data = new byte[random.nextInt(500) == 0 ? 600_000 : 1 + random.nextInt(4096)];
            random.nextBytes(data);
            return new Cell(data, sum(data));
        }

        static long sum(byte[] data) {
            CRC32 crc = new CRC32();
            crc.update(data);
            return crc.getValue();
        }

        void check(int round) {
            if (sum(data) != sum) fail("round " + round + ": a cell is not what it was");
        }
    }

    static void fail(String why) {
        System.out.println("failed: " + why);
        Runtime.getRuntime().halt(1);
    }

    static final List<List<Cell>> heaps = new ArrayList<>();
    static final AtomicLong changed = new AtomicLong();
    static int round;
    static boolean stopped;

    public static void main(String[] args) {
        Signal.handle(new Signal("TERM"), signal -> System.exit(0));
        Runtime.getRuntime().addShutdownHook(new Thread(Heap::stop));
        for (int i = 0; i < THREADS; i++) {
            heaps.add(new ArrayList<>());
        }
        CyclicBarrier barrier = new CyclicBarrier(THREADS, Heap::endRound);
        for (int i = 0; i < THREADS; i++) {
            int number = i;
            new Thread(() -> work(number, barrier), "worker-" + i).start();
        }
    }

    /** The program prints nothing after this. */
    static synchronized void stop() {
        stopped = true;
        System.out.println("stopped");
    }

    /** A round of all threads is over. */
    static synchronized void endRound() {
        if (stopped) return;
        round++;
        if (changed.get() != (long) round * THREADS * 10) fail("round " + round + ": " + changed + " cells were changed");
        System.out.println("round " + round);
    }

    static void work(int number, CyclicBarrier barrier) {
        try {
            Random random = new Random(number);
            for (int i = 0; ; i++) {
                List<Cell> mine = heaps.get((number + i) % THREADS); // another one each round
                for (int k = 0; k < 10; k++) {
                    if (mine.size() < CELLS) mine.add(Cell.of(random));
                    else mine.set(random.nextInt(CELLS), Cell.of(random));
                    changed.incrementAndGet();
                }
                for (Cell cell : mine) {
                    cell.check(i + 1);
                }
                barrier.await();
                Thread.sleep(20);
            }
        } catch (Exception e) {
            fail(e.toString());
        }
    }
}
