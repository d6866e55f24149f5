package org.tscores;

import java.lang.reflect.Field;
import java.lang.reflect.Modifier;
import java.util.List;
import java.util.Map;
import java.util.concurrent.CompletableFuture;
import java.util.concurrent.TimeUnit;
import java.util.concurrent.atomic.AtomicBoolean;
import java.util.concurrent.atomic.AtomicReference;
import org.pytorch.serve.util.ConfigManager;
import org.pytorch.serve.wlm.BatchAggregator;
import org.pytorch.serve.wlm.Model;
import org.pytorch.serve.wlm.ModelManager;
import org.pytorch.serve.wlm.ModelVersionName;
import org.pytorch.serve.wlm.WorkLoadManager;
import org.pytorch.serve.wlm.WorkerState;
import org.pytorch.serve.wlm.WorkerThread;
import org.slf4j.Logger;
import org.slf4j.LoggerFactory;

/**
 * TorchServe's workload manager, except that a worker which is scaled away first answers the request that it computes.
 * The stock one closes the worker's channel and then puts its request back into the queue; the worker's thread, woken by
 * the closing, mostly comes first and answers 500 "Worker died.".
 *
 * <p>TorchServe has no door for this: the manager is put into the private field of ModelManager. 0.12.0 is the last
 * TorchServe; where its inside differs nevertheless, scaling stays TorchServe's own.
 *
 * <p>Source: org.pytorch.serve.wlm.WorkLoadManager.modelChanged, WorkerThread.run and shutdown.
 */
final class DrainingWorkLoadManager extends WorkLoadManager {
    private static final Logger logger = LoggerFactory.getLogger(DrainingWorkLoadManager.class);
    private static final int LOOK_MILLISECONDS = 50;
    private static final int HTTP_OK = 200;

    private final Map<ModelVersionName, List<WorkerThread>> workers;

    /** Shares everything with the stock manager, which may have begun to start workers. */
    private DrainingWorkLoadManager(WorkLoadManager stock) throws ReflectiveOperationException {
        super(ConfigManager.getInstance(), null);
        for (Field field : WorkLoadManager.class.getDeclaredFields()) {
            if (!Modifier.isStatic(field.getModifiers())) {
                field.setAccessible(true);
                field.set(this, field.get(stock));
            }
        }
        workers = read(WorkLoadManager.class, "workers", this);
    }

    /** Waits for TorchServe to make its model manager, since plug-ins are loaded before, and steps in. */
    static void install() {
        try {
            while (ModelManager.getInstance() == null) {
                TimeUnit.MILLISECONDS.sleep(LOOK_MILLISECONDS);
            }
            ModelManager models = ModelManager.getInstance();
            Field manager = field(ModelManager.class, "wlm");
            manager.set(models, new DrainingWorkLoadManager((WorkLoadManager) manager.get(models)));
        } catch (InterruptedException e) {
            Thread.currentThread().interrupt();
        } catch (ReflectiveOperationException | RuntimeException | LinkageError e) {
            logger.warn("ts-cores: a worker that is scaled away will lose its request: {}", e.toString());
        }
    }

    @Override
    public CompletableFuture<Integer> modelChanged(Model model, boolean isStartup, boolean isCleanUp) {
        synchronized (model.getModelVersionName()) { // the stock method's own lock, held across both steps
            if (model.getMaxWorkers() > 0) { // else the model goes: its files too, and nobody is left for the queue
                retireSurplus(model);
            }
            return super.modelChanged(model, isStartup, isCleanUp);
        }
    }

    /** Takes the workers that the model does not want any more out of the stock manager's sight, to end by themselves. */
    private void retireSurplus(Model model) {
        List<WorkerThread> threads = workers.getOrDefault(model.getModelVersionName(), List.of());
        for (int last = threads.size() - 1; last >= model.getMaxWorkers(); last--) {
            WorkerThread thread = threads.get(last);
            try {
                Retiree retiree = new Retiree(thread);
                if (retiree.canDrain()) {
                    threads.remove(last);
                    retiree.takesNoMore();
                    model.removeJobQueue(thread.getWorkerId());
                    scheduleAsync(() -> retiree.leave(model));
                }
            } catch (ReflectiveOperationException | RuntimeException | LinkageError e) {
                logger.warn("ts-cores: worker {} may lose its request: {}", thread.getWorkerId(), e.toString());
            }
        }
    }

    /** A worker on its way out. */
    private static final class Retiree {
        private final WorkerThread worker;
        private final AtomicBoolean running;
        private final AtomicReference<Thread> thread;
        private final BatchAggregator aggregator;
        private final Map<?, ?> jobs;

        Retiree(WorkerThread worker) throws ReflectiveOperationException {
            this.worker = worker;
            running = read(WorkerThread.class, "running", worker);
            thread = read(WorkerThread.class, "currentThread", worker);
            aggregator = read(WorkerThread.class, "aggregator", worker);
            jobs = read(BatchAggregator.class, "jobs", aggregator);
        }

        /** Only a plain worker answers one batch after the other; the asynchronous and sequence ones hold several. */
        boolean canDrain() {
            return worker.getState() == WorkerState.WORKER_MODEL_LOADED && aggregator.getClass() == BatchAggregator.class;
        }

        /** A computing worker ends with its answer; one that waits takes one request more, or leave ends it. */
        void takesNoMore() {
            running.set(false);
            worker.setState(WorkerState.WORKER_SCALED_DOWN, HTTP_OK); // or its end would be taken for a crash
        }

        /**
         * Ends the worker when it has had nothing to do at two looks, or when its model goes. How long it may compute is
         * bounded where it waits for the answer, by responseTimeout. Not by WorkerThread.shutdown, which would put a
         * request that is just being answered back into the queue.
         */
        void leave(Model model) {
            try {
                boolean idle = false;
                while (thread.get() != null && model.getMaxWorkers() > 0 && !(idle && jobs.isEmpty())) {
                    idle = jobs.isEmpty();
                    TimeUnit.MILLISECONDS.sleep(LOOK_MILLISECONDS);
                }
            } catch (InterruptedException e) {
                Thread.currentThread().interrupt();
            }
            Thread waiting = thread.getAndSet(null);
            if (waiting != null) {
                waiting.interrupt(); // its own end closes the channel and kills the process
            }
        }
    }

    @SuppressWarnings("unchecked")
    private static <T> T read(Class<?> owner, String name, Object from) throws ReflectiveOperationException {
        return (T) field(owner, name).get(from);
    }

    private static Field field(Class<?> owner, String name) throws ReflectiveOperationException {
        Field field = owner.getDeclaredField(name);
        field.setAccessible(true);
        return field;
    }
}
