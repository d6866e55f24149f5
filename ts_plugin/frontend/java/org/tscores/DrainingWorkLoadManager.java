package org.tscores;

import java.lang.reflect.Field;
import java.lang.reflect.Modifier;
import java.net.HttpURLConnection;
import java.util.List;
import java.util.Map;
import java.util.Set;
import java.util.concurrent.CompletableFuture;
import java.util.concurrent.ConcurrentHashMap;
import java.util.concurrent.TimeUnit;
import java.util.concurrent.atomic.AtomicReference;
import org.pytorch.serve.job.Job;
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
 * TorchServe's workload manager, except that a worker which is scaled away first answers the request that it computes,
 * and does not start again. The stock one closes the worker's channel and then puts its request back into the queue; the
 * worker's thread, woken by the closing, mostly comes first and answers 500 "Worker died.". And it forgets a worker that
 * waits for its restart after a crash, which then starts all the same, in no list.
 *
 * <p>TorchServe has no door for this: the manager is put into the private field of ModelManager. 0.12.0 is the last
 * TorchServe; where its inside differs nevertheless, scaling stays TorchServe's own.
 *
 * <p>Source: org.pytorch.serve.wlm.WorkLoadManager.modelChanged, WorkerThread.run, shutdown and retry.
 */
final class DrainingWorkLoadManager extends WorkLoadManager {
    private static final Logger logger = LoggerFactory.getLogger(DrainingWorkLoadManager.class);
    private static final int LOOK_MILLISECONDS = 50;

    private final Map<ModelVersionName, List<WorkerThread>> workers;
    /** Of the workers that were scaled away and have not ended yet. */
    private final Set<DrainingAggregator> draining = ConcurrentHashMap.newKeySet();

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
            Field field = field(ModelManager.class, "wlm");
            DrainingWorkLoadManager manager = new DrainingWorkLoadManager((WorkLoadManager) field.get(models));
            field.set(models, manager);
            for (ModelVersionName model : manager.workers.keySet()) {
                synchronized (model) { // the lock of modelChanged
                    manager.equip(model);
                }
            }
        } catch (InterruptedException e) {
            Thread.currentThread().interrupt();
        } catch (ReflectiveOperationException | RuntimeException | LinkageError e) {
            logger.warn("ts-cores: a worker that is scaled away will lose its request: {}", e.toString());
        }
    }

    /**
     * As TorchServe's own: where workers that have to go hold a GPU's memory, the answer comes when they are gone, or is
     * 408 after unregister_model_timeout. For others it comes at once: TorchServe blocks an event loop of its HTTP server
     * while it waits for it. A worker that hangs ends with its responseTimeout, as it would without being scaled away.
     */
    @Override
    public CompletableFuture<Integer> modelChanged(Model model, boolean isStartup, boolean isCleanUp) {
        synchronized (model.getModelVersionName()) { // the stock method's own lock, held across all steps
            if (model.getMaxWorkers() > 0) {
                retireSurplus(model);
            } else { // the model goes, its files too: nobody may compute any longer
                draining.stream().filter(worker -> worker.serves(model)).forEach(DrainingAggregator::cut);
            }
            CompletableFuture<Integer> answer = super.modelChanged(model, isStartup, isCleanUp);
            equip(model.getModelVersionName());
            CompletableFuture<?>[] ends =
                    draining.stream()
                            .filter(worker -> worker.serves(model) && worker.holdsDevice())
                            .map(DrainingAggregator::ended)
                            .toArray(CompletableFuture<?>[]::new);
            if (ends.length == 0) {
                return answer;
            }
            CompletableFuture<Integer> gone =
                    CompletableFuture.allOf(ends)
                            .thenApply(nothing -> HttpURLConnection.HTTP_OK)
                            .completeOnTimeout(
                                    HttpURLConnection.HTTP_CLIENT_TIMEOUT,
                                    ConfigManager.getInstance().getUnregisterModelTimeout(),
                                    TimeUnit.SECONDS);
            return answer.thenCombine(gone, Math::max); // the worse status of the two
        }
    }

    /** Runs a task of TorchServe's; a restart after a crash is none any more when the worker was scaled away meanwhile. */
    @Override
    public void scheduleAsync(Runnable task) {
        if (task instanceof WorkerThread && ((WorkerThread) task).getState() == WorkerState.WORKER_SCALED_DOWN) {
            logger.info("ts-cores: worker {} was scaled away before its restart", ((WorkerThread) task).getWorkerId());
            return;
        }
        super.scheduleAsync(task);
    }

    /** Gives the model's workers, before they have loaded it, the aggregator that they can be retired through. */
    private void equip(ModelVersionName model) {
        for (WorkerThread worker : workers.getOrDefault(model, List.of())) {
            try {
                BatchAggregator stock = read(WorkerThread.class, "aggregator", worker);
                // Only a plain worker answers one batch after the other; the asynchronous and sequence ones hold several.
                if (stock.getClass() == BatchAggregator.class && worker.getState() != WorkerState.WORKER_MODEL_LOADED) {
                    Model served = read(BatchAggregator.class, "model", stock);
                    Map<String, Job> jobs = read(BatchAggregator.class, "jobs", stock);
                    AtomicReference<Thread> connected = read(WorkerThread.class, "currentThread", worker);
                    field(WorkerThread.class, "aggregator")
                            .set(worker, new DrainingAggregator(served, worker, connected, jobs));
                }
            } catch (ReflectiveOperationException | RuntimeException | LinkageError e) {
                logger.warn("ts-cores: worker {} may lose its request: {}", worker.getWorkerId(), e.toString());
            }
        }
    }

    /** Takes the workers that the model does not want any more out of the stock manager's sight, to end by themselves. */
    private void retireSurplus(Model model) {
        List<WorkerThread> threads = workers.getOrDefault(model.getModelVersionName(), List.of());
        for (int last = threads.size() - 1; last >= model.getMaxWorkers(); last--) {
            WorkerThread worker = threads.get(last);
            try {
                BatchAggregator aggregator = read(WorkerThread.class, "aggregator", worker);
                if (worker.getState() == WorkerState.WORKER_MODEL_LOADED && aggregator instanceof DrainingAggregator) {
                    DrainingAggregator retiree = (DrainingAggregator) aggregator;
                    threads.remove(last);
                    retiree.retire();
                    model.removeJobQueue(worker.getWorkerId());
                    draining.add(retiree);
                    retiree.ended().thenRun(() -> draining.remove(retiree));
                }
            } catch (ReflectiveOperationException | RuntimeException | LinkageError e) {
                logger.warn("ts-cores: worker {} may lose its request: {}", worker.getWorkerId(), e.toString());
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
