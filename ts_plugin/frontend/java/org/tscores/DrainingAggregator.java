package org.tscores;

import java.net.HttpURLConnection;
import java.util.ArrayList;
import java.util.Map;
import java.util.concurrent.CompletableFuture;
import java.util.concurrent.ExecutionException;
import java.util.concurrent.atomic.AtomicReference;
import org.pytorch.serve.job.Job;
import org.pytorch.serve.wlm.BatchAggregator;
import org.pytorch.serve.wlm.Model;
import org.pytorch.serve.wlm.WorkerState;
import org.pytorch.serve.wlm.WorkerThread;

/**
 * Takes requests off the model's queue as TorchServe's own aggregator does, for a worker that can be told to take no
 * more. A worker that waits for a request can only be woken by an interrupt, and the interrupt may come when a request
 * has left the queue already, or while a batch is filled: then the worker computes what it has taken and ends after it.
 *
 * <p>Source: org.pytorch.serve.wlm.WorkerThread.run, BatchAggregator.getRequest, Model.pollBatch. LinkedBlockingDeque.poll
 * throws InterruptedException only while it holds no element.
 */
final class DrainingAggregator extends BatchAggregator {
    private final WorkerThread worker;
    /** The worker's thread; TorchServe sets it to null before it interrupts a worker whose connection has closed. */
    private final AtomicReference<Thread> connected;
    /** The thread that waits for a request, while it does; guarded by this. */
    private Thread poller;

    private volatile CompletableFuture<?> ended;

    /** Shares {@code jobs} with the aggregator that it replaces: the worker may just be loading its model with that one. */
    DrainingAggregator(Model model, WorkerThread worker, AtomicReference<Thread> connected, Map<String, Job> jobs) {
        super(model);
        this.worker = worker;
        this.connected = connected;
        this.jobs = jobs;
    }

    /** Lets the worker end: at once if it waits for a request, else after the answer that it computes. */
    synchronized void retire() {
        Process process = worker.getLifeCycle().getProcess();
        ended = process == null ? CompletableFuture.completedFuture(null) : process.onExit();
        worker.setState(WorkerState.WORKER_SCALED_DOWN, HttpURLConnection.HTTP_OK); // else its end is taken for a crash
        if (poller != null) {
            poller.interrupt();
        }
    }

    /** Lets the worker end whatever it computes: its model goes. */
    void cut() {
        Thread thread = connected.getAndSet(null);
        if (thread != null) {
            thread.interrupt();
        }
    }

    boolean serves(Model one) {
        return model == one;
    }

    boolean holdsDevice() {
        return worker.getGpuId() >= 0;
    }

    /** The end of the process of a worker that was told to retire. */
    CompletableFuture<?> ended() {
        return ended;
    }

    @Override
    public void pollBatch(String workerId, WorkerState state) throws InterruptedException, ExecutionException {
        synchronized (this) {
            if (worker.getState() == WorkerState.WORKER_SCALED_DOWN) {
                throw new InterruptedException("scaled down"); // WorkerThread.run disconnects, and ends the process
            }
            poller = Thread.currentThread();
        }
        try {
            super.pollBatch(workerId, state);
        } catch (InterruptedException e) {
            Thread.currentThread().interrupt(); // looked at below, together with what was taken before it came
        } finally {
            synchronized (this) {
                poller = null;
            }
        }
        boolean interrupted = Thread.interrupted();
        if (interrupted && (jobs.isEmpty() || connected.get() == null)) {
            failJobs();
            throw new InterruptedException("scaled down or disconnected");
        }
    }

    /** Answers the requests of a batch that was not sent before the worker died; TorchServe forgets them. */
    private void failJobs() {
        for (Job job : new ArrayList<>(jobs.values())) {
            if (!job.isControlCmd()) {
                job.sendError(HttpURLConnection.HTTP_INTERNAL_ERROR, "Worker died.");
            }
        }
    }
}
