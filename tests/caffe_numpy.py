"""What Caffe's layers compute, transcribed into NumPy in double precision, one entry at a time.

Independent of normface_ext: the tests of normface_ext.caffe hold its modules against these functions.
Every `*_backward` returns the gradients that Caffe writes, right or wrong.
"""

import numpy as np

CPU_EPS, GPU_EPS, L1_EPS = 1e-6, 1e-12, 1e-6
FLT_MIN = 1.17549435082228750797e-38


def normalize(x, eps, p=2):
    """(y, n) of rows."""
    n = np.array([np.sqrt(np.sum(row * row) + eps) if p == 2 else np.sum(np.abs(row)) + eps for row in x])
    return x / n[:, None], n[:, None]


def normalize_backward(x, dy, eps, p=2, dn=None, bp_norm=False, fix_gradient_on_gpu=False):
    y, n = normalize(x, eps, p)
    dx = np.zeros_like(x)
    for i in range(len(x)):
        slope = y[i] if p == 2 else np.sign(x[i])
        dx[i] = dy[i] - slope * np.dot(y[i], dy[i])
        if not fix_gradient_on_gpu:
            dx[i] /= n[i, 0]
        if bp_norm and dn is not None:
            dx[i] += dn[i, 0] * slope
    return dx


def inner_product(x, weight, normalize_weight, eps):
    """(top, the stored weight afterwards)."""
    weight = weight.copy()
    if normalize_weight:
        for row in weight:
            row /= np.sqrt(np.dot(row, row) + eps)
    return np.array([[np.dot(a, b) for b in weight] for a in x]), weight


def inner_product_backward(x, stored_weight, grad):
    return grad @ stored_weight, grad.T @ x


def inner_distance(x, weight, p):
    top = np.zeros((len(x), len(weight)))
    for i in range(len(x)):
        for j in range(len(weight)):
            difference = x[i] - weight[j]
            top[i, j] = np.sum(difference**2) if p == 2 else np.sum(np.abs(difference))
    return top


def inner_distance_backward(x, weight, grad, p):
    dx, dw = np.zeros_like(x), np.zeros_like(weight)

    def signed(g, difference):  # g * (0 < d) - (d < 0): the macro's parentheses are missing
        return g * (difference > 0) - (difference < 0)

    for i in range(len(x)):
        for j in range(len(weight)):
            for k in range(x.shape[1]):
                a, b = x[i, k] - weight[j, k], weight[j, k] - x[i, k]
                dx[i, k] += 2 * grad[i, j] * a if p == 2 else signed(grad[i, j], a)
                dw[j, k] += 2 * grad[i, j] * b if p == 2 else signed(grad[i, j], b)
    return dx, dw


def scale(x, s, low, high):
    """(top, the stored scale afterwards)."""
    stored = min(max(s, low), high)
    return stored * x, stored


def softmax(x):
    e = np.exp(x - x.max(axis=1, keepdims=True))
    return e / e.sum(axis=1, keepdims=True)


def normalizer(mode, rows, valid):
    return max(1.0, {"FULL": rows, "VALID": valid, "BATCH_SIZE": rows, "NONE": 1}[mode])


def softmax_loss(scores, labels, ignore=None, mode="VALID"):
    p, loss, count = softmax(scores), 0.0, 0
    for i, y in enumerate(labels):
        if y == ignore:
            continue
        loss -= np.log(max(p[i, y], FLT_MIN))
        count += 1
    return loss / normalizer(mode, len(labels), count)


def softmax_loss_backward(scores, labels, ignore=None, mode="VALID"):
    grad, count = softmax(scores), 0
    for i, y in enumerate(labels):
        if y == ignore:
            grad[i] = 0
        else:
            grad[i, y] -= 1
            count += 1
    return grad / normalizer(mode, len(labels), count)


CONTRASTIVE = {
    "positive_margin": 0.0, "negative_margin": 1.0, "positive_weight": 1.0, "negative_weight": 1.0,
    "normalize_negative": None, "positive_outlier_thresh": 4.0, "max_negative_only": False,
    "max_positive_only": False, "positive_first": False, "positive_upper_bound": 1.0,
    "exp_negative_weight": False, "add_intra_mae": False, "max_negative_margin": 1.2,
}  # fmt: skip


def contrastive(d, labels, intra=0.0, **options):
    """(loss, second top, gradient, running mean afterwards) of GeneralContrastiveLoss."""
    o = {**CONTRASTIVE, **options}
    rows, classes = d.shape
    margin = o["negative_margin"] + (intra if o["add_intra_mae"] else 0.0)
    terms, hardest, easiest = np.zeros_like(d), [0] * rows, 0
    positives = negatives = 0.0
    for i, y in enumerate(labels):
        for j in range(classes):
            if j == y:
                hinge = min(o["positive_outlier_thresh"], max(0.0, d[i, j] - o["positive_margin"]))
                terms[i, j] = hinge * o["positive_weight"]
                positives += hinge
                if o["max_positive_only"] and terms[i, j] < terms[easiest, labels[easiest]]:
                    easiest = i
            elif d[i, j] < margin:
                hinge = margin - d[i, j]
                size = np.exp(-d[i, j]) if o["exp_negative_weight"] else hinge
                terms[i, j] = size * o["negative_weight"]
                negatives += hinge
                if o["max_negative_only"] and terms[i, j] > terms[i, hardest[i]]:
                    hardest[i] = j
    gradient = np.zeros_like(d)
    total = 0.0
    for i, y in enumerate(labels):
        far = o["positive_first"] and d[i, y] > o["positive_upper_bound"]
        if o["max_positive_only"] and i != easiest:
            terms[i, y] = 0
        for j in range(classes):
            if j == y:
                inside = o["positive_margin"] < d[i, j] < o["positive_outlier_thresh"]
                if far or (inside and not (o["max_positive_only"] and i != easiest)):
                    gradient[i, j] = o["positive_weight"]
            else:
                if far or (o["max_negative_only"] and j != hardest[i]):
                    terms[i, j] = 0
                elif d[i, j] < margin:
                    size = np.exp(-d[i, j]) if o["exp_negative_weight"] else 1.0
                    gradient[i, j] = -size * o["negative_weight"]
                    total += size * o["negative_weight"]
    if o["normalize_negative"] is not None:
        ratio = abs(total) / o["normalize_negative"] / rows
        if ratio > o["positive_weight"]:
            for i, y in enumerate(labels):
                for j in range(classes):
                    if j != y:
                        gradient[i, j] /= ratio
    intra = min(0.99 * intra + 0.01 * positives / rows, o["max_negative_margin"])
    top = [positives / rows, negatives / rows / (classes - 1)] + [intra] * o["add_intra_mae"]
    return np.abs(terms).sum() / rows, np.array(top), gradient / rows, intra


TRIPLET = {
    "margin": 0.2, "add_center_loss": True, "hardest_only": False, "positive_first": False,
    "positive_upper_bound": 1.0, "positive_weight": 1.0, "negative_weight": 1.0,
}  # fmt: skip


def triplet(d, labels, **options):
    """(loss, second top, gradient) of GeneralTripletLoss."""
    o = {**TRIPLET, **options}
    rows, classes = d.shape
    terms, gradient = np.zeros_like(d), np.zeros_like(d)
    for i, y in enumerate(labels):
        hardest = -1
        for j in range(classes):
            if j == y:
                continue
            terms[i, j] = max(0.0, d[i, y] + o["margin"] - d[i, j]) * o["negative_weight"]
            if terms[i, j] > 0 and (hardest < 0 or terms[i, j] > terms[i, hardest]):
                hardest = j
        if o["hardest_only"] and hardest >= 0:
            for j in range(classes):
                if j != hardest:
                    terms[i, j] = 0
        if o["positive_first"] and d[i, y] > o["positive_upper_bound"]:
            terms[i] = 0
            gradient[i, y] = o["positive_weight"]
            continue
        gradient[i] = terms[i]  # what the forward pass left in the diff
        active = 0
        if o["hardest_only"]:
            if hardest >= 0 and d[i, hardest] != 0:
                gradient[i, hardest] = -o["negative_weight"]
                active = 1
        else:
            for j in range(classes):
                if j != y:
                    on = d[i, y] + o["margin"] > d[i, j]
                    gradient[i, j] = -o["negative_weight"] if on else 0.0
                    active += on
        if o["add_center_loss"] or active:
            gradient[i, y] = o["positive_weight"]
    positives = np.mean([d[i, y] for i, y in enumerate(labels)])
    others = sum(d[i, j] for i, y in enumerate(labels) for j in range(classes) if j != y)
    return np.abs(terms).sum() / rows, np.array([positives, others / rows / (classes - 1)]), gradient / rows


def accuracy(scores, labels, min_is_better=False, top_k=1, ignore=None):
    right = count = 0
    for row, y in zip(scores, labels, strict=True):
        if y == ignore:
            continue
        pairs = sorted(((value, j) for j, value in enumerate(row)), reverse=not min_is_better)
        right += y in [j for _, j in pairs[:top_k]]
        count += 1
    return right / count


def pair_contrastive(a, b, labels_a, labels_b, margin, legacy):
    """(loss, da, db)."""
    loss, da, db, count = 0.0, np.zeros_like(a), np.zeros_like(b), len(a)
    for i in range(count):
        difference = a[i] - b[i]
        squared = np.dot(difference, difference)
        if labels_a[i] == labels_b[i]:
            loss += squared
            da[i] = difference / count
        elif legacy:
            loss += max(margin - squared, 0)
            da[i] = -difference / count if margin > squared else 0
        else:
            distance = np.sqrt(squared)
            loss += max(margin - distance, 0) ** 2
            gap = margin - distance
            da[i] = -gap / (distance + 1e-4) * difference / count if gap > 0 else 0
        db[i] = -da[i]
    return loss / count / 2, da, db


def triplet_of_rows(a, p, n, margin):
    """(loss, da, dp, dn)."""
    loss, gradients, count = 0.0, [np.zeros_like(a) for _ in range(3)], len(a)
    for i in range(count):
        hinge = margin + np.sum((a[i] - p[i]) ** 2) - np.sum((a[i] - n[i]) ** 2)
        if hinge > 0:
            loss += hinge
            for gradient, row in zip(gradients, (n[i] - p[i], p[i] - a[i], a[i] - n[i]), strict=True):
                gradient[i] = row / count
    return loss / count / 2, *gradients
